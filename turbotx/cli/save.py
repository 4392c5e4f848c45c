"""`turbotx compile --save`: a model as one file, for the CPU and for GPUs that need not be present.

In: MODEL, targets, a path. Out: a file for `turbotx.load`, with every kernel that the example call
needs at any shape::

    turbotx compile minilm --target sm_90 --target cpu --save minilm.ttx
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from turbotx.cli.inputs import EXAMPLE_SHAPE
from turbotx.cli.models import ModelWithInputs, Source
from turbotx.cli.output import OK, Output, Steps
from turbotx.engine.optimize import optimize
from turbotx.errors import InputError
from turbotx.report.dump import check_file
from turbotx.saved.save import check_target, save


def save_model(
    model: Source, path: Path, targets: Sequence[str], output: Output, packed: bool = False
) -> int:
    """Write the file and print what it contains. packed: the program over tokens.

    Raises SaveError for an unsupported target, InputError for a file that is saved already.
    """
    if model.is_saved:
        raise InputError(f"{model} is saved already: name the model that it was saved from")
    names = chosen_targets(targets)
    check_file(path)
    with output.steps(f"load {model}", total=3) as steps:
        loaded = model.load(EXAMPLE_SHAPE)
        steps("capture and fuse")
        written = write_file(loaded, path, names, steps, packed)
    output.console.print(show_written(written))
    output.result({"model": str(model), **written})
    return OK


def chosen_targets(targets: Sequence[str]) -> list[str]:
    """Return the targets to save for, by default the CPU; raise SaveError for an unsupported
    one."""
    return [check_target(name) for name in dict.fromkeys(targets)] or ["cpu"]


def chosen_options(loaded: ModelWithInputs, packed: bool) -> dict[str, Any]:
    """Return the options of `turbotx.optimize` chosen on the command line."""
    return {**loaded.options, **({"padding": "packed"} if packed else {})}


def write_file(
    loaded: ModelWithInputs, path: Path, targets: Sequence[str], steps: Steps, packed: bool
) -> dict[str, Any]:
    """Write the file and return its description for `--json`."""
    fast = optimize(loaded.model, **chosen_options(loaded, packed))
    fast(*loaded.args, **loaded.kwargs)
    expected = 0

    def progress(done: int, total: int, what: str) -> None:
        nonlocal expected
        if not expected:
            steps.expect(total)
            expected = total
        steps(f"compile {what}")

    steps(f"save for {', '.join(targets)}")
    save(fast, path, targets=targets, progress=progress)
    return {"saved": str(path), "targets": list(targets), "nbytes": path.stat().st_size}


def show_written(written: dict[str, Any]) -> str:
    """Return a line about what was saved: file, megabytes and targets."""
    names, size = " and ".join(written["targets"]), written["nbytes"] / 1e6
    return f"{written['saved']}: {size:.1f} MB, for {names}; turbotx.load takes it"
