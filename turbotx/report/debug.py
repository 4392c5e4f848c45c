"""Debug: TURBOTX_DUMP and TURBOTX_VERIFY, applied to everything that a process compiles.

In: an engine and a call that it has captured and is about to compile. Out: the stages as files, one
folder per compiled call, or a VerifyError naming the launch with too large an error::

    TURBOTX_DUMP=out TURBOTX_VERIFY=1 python serve_my_model.py
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from turbotx.capture.arguments import tensors_of
from turbotx.capture.sandbox.leaks import find_leaks
from turbotx.capture.trace import Captured
from turbotx.engine.compiled import Compiled
from turbotx.engine.engine import Engine
from turbotx.errors import VerifyError
from turbotx.report.origin import observe
from turbotx.report.report import Report, find_dims

log = logging.getLogger("turbotx")
Finish = Callable[[Compiled], None]


def watch(
    engine: Engine, captured: Captured, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Finish:
    """Observe a captured call before compilation; return the function to call with the compiled
    call."""
    origin = observe(captured)
    tensors = tensors_of(args, kwargs)
    verifies = os.environ.get("TURBOTX_VERIFY", "0") not in ("", "0")
    if verifies:
        _find_leaks(engine, args, kwargs)

    def finish(compiled: Compiled) -> None:
        dims = find_dims(compiled, tensors)
        at = compiled.at(tuple(dims.values()))
        report = Report(at, origin, dims, engine.options.planner, engine=engine)
        if verifies:
            report = _verify(engine, report, args, kwargs)
        folder = os.environ.get("TURBOTX_DUMP")
        if folder:
            dumped = report.dump(_new_folder(Path(folder), report.name))
            log.info("dumped %d files into %s", len(dumped.files), dumped.folder)

    return finish


def _new_folder(parent: Path, name: str) -> Path:
    """Create and return a folder that no other call or process uses."""
    for k in itertools.count():
        folder = parent / f"{name}_{k}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError


def _find_leaks(engine: Engine, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise VerifyError if the trace has left its own objects with the user."""
    found = find_leaks((engine.model, args, dict(kwargs)), "call")
    if found:
        raise VerifyError(
            f"TURBOTX_VERIFY: the capture of {type(engine.model).__name__} left behind "
            f"{'; '.join(found)}. Please report it"
        )


def _verify(
    engine: Engine, report: Report, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Report:
    numerics = report.numerics_of(engine, args, kwargs)
    for error in (*numerics.launches, *numerics.outputs):
        if not error.holds:
            raise VerifyError(
                f"TURBOTX_VERIFY: {error.name} of {report.name} differs from float64 by "
                f"{error.turbotx:.3g}, eager by {error.eager:.3g}; {error.allowed:.3g} is allowed"
            )
    log.info("verified %d launches of %s", len(numerics.launches), report.name)
    return report.with_findings(numerics=numerics)
