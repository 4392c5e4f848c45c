"""`turbotx profile`: time, bytes and bandwidth of every launch, by kernel and by module.

In: MODEL, a shape, the number of runs. Out: tables; and, if files are named, a Chrome trace, and a
report.html whose roofline shows what each launch achieved::

    turbotx profile minilm --shape batch=1,seq=40 --trace trace.json --report report.html
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table

import turbotx.report as reports
from turbotx.cli.inputs import EXAMPLE_SHAPE, parse_shape, resize, view_at
from turbotx.cli.models import ModelWithInputs, Source
from turbotx.cli.output import OK, Output
from turbotx.errors import InputError
from turbotx.report.amounts import show_shape
from turbotx.report.dump import check_file, write_text
from turbotx.report.profile import Profile
from turbotx.report.table import right, titled_table
from turbotx.saved.load import SavedModule
from turbotx.saved.profile import profile_saved


def profile_model(
    model: Source, shapes: Sequence[str], runs: int,
    trace: Path | None, page: Path | None, output: Output,
) -> int:  # fmt: skip
    """Profile at one shape and print the result; return the exit code. Raises InputError for
    several shapes, or fewer than 1 run."""
    if len(shapes) > 1:
        raise InputError("profile takes one --shape at a time")
    if runs < 1:
        raise InputError(f"--runs {runs}: at least 1")
    dims = parse_shape(shapes[0]) if shapes else {}
    check_file(trace)
    check_file(page)
    with output.steps(f"load {model}", total=3) as steps:
        loaded = model.load({**EXAMPLE_SHAPE, **dims})
        if isinstance(loaded.model, SavedModule):
            return _profile_saved(model, loaded, runs, trace, page, output)
        steps("capture, fuse and build")
        report = reports.explain(loaded.optimized(), *loaded.args, **loaded.kwargs)
        report = view_at(report, dims)
        steps(f"run {runs} times")
        args, kwargs = resize(report, loaded.args, loaded.kwargs)
        found = report.profile(*args, runs=runs, **kwargs)
    _write_trace(found, trace)
    if page is not None:
        write_text(page, report.with_findings(profile=found).to_html())
    output.console.print(f"{report.name} at {show_shape(report.dims)}, {_threads()}")
    _show(found, trace, output)
    if page is not None:
        output.console.print(f"report with the times: {page}")
    output.result({"model": str(model), "dims": report.dims, **_as_dict(found)})
    return OK


def _profile_saved(
    source: Source, loaded: ModelWithInputs, runs: int, trace: Path | None, page: Path | None,
    output: Output,
) -> int:  # fmt: skip
    """Profile a saved file, whose launches have names, but no graph to derive costs from."""
    if page is not None:
        raise InputError("--report needs the model: a saved file holds neither graph nor source")
    found, dims = profile_saved(loaded.model, loaded.args, loaded.kwargs, runs)
    _write_trace(found, trace)
    output.console.print(f"{source} at {show_shape(dims)}, {_threads()}")
    _show(found, trace, output)
    output.result({"model": str(source), "dims": dims, **_as_dict(found)})
    return OK


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'' if count == 1 else 's'}"


def _show(found: Profile, trace: Path | None, output: Output) -> None:
    output.console.print(kernels_table(found))
    if any(t.launch.module for t in found.launches):
        output.console.print(modules_table(found))
    guards = f"; the guards of a call take {found.guards_us:.1f} us" if found.guards_us else ""
    output.console.print(
        f"{found.total_us / 1e3:.3f} ms a run (median of {found.runs}), of which "
        f"{found.between_us / 1e3:.3f} ms between launches "
        f"({found.between_launches_us:.2f} us a launch); reading the clock around every "
        f"launch added {found.overhead:.1%}{guards}"
    )
    if trace is not None:
        output.console.print(f"trace for chrome://tracing or Perfetto: {trace}")


def _write_trace(found: Profile, path: Path | None) -> None:
    if path is not None:
        write_text(path, json.dumps(found.to_chrome_trace()) + "\n")


def kernels_table(found: Profile) -> Table:
    """Tabulate times by kernel, GEMMs by size."""
    rows: dict[str, list[Any]] = {}
    for t in found.launches:
        flops, nbytes = t.launch.traffic.flops, t.launch.traffic.compulsory_nbytes
        name = t.launch.kernel or t.launch.name.rstrip("0123456789").rstrip("_")
        row = rows.setdefault(f"{name}, {flops / 1e6:.1f} MFLOP" if flops else name, [0, 0.0, 0, 0])
        for k, value in enumerate((1, t.median_us, nbytes, flops)):
            row[k] += value
    numbers = right("times", "ms", "share", "GB/s", "GFLOP/s")
    table = titled_table("By kernel", Column("launch", overflow="fold", min_width=24), *numbers)
    for name, (count, us, nbytes, flops) in sorted(rows.items(), key=lambda item: -item[1][1]):
        speeds = (nbytes / us / 1e3, flops / us / 1e3) if us else (0.0, 0.0)
        table.add_row(
            name, str(count), f"{us / 1e3:.3f}", f"{us / found.total_us:.1%}",
            f"{speeds[0]:.1f}" if nbytes else "", f"{speeds[1]:.1f}" if flops else "",
        )  # fmt: skip
    return table


def modules_table(found: Profile) -> Table:
    """Tabulate times by module down to its layer, longest first, at most 12."""
    numbers = right("launches", "ms", "share")
    table = titled_table("By module", Column("module", overflow="fold"), *numbers)
    rows = found.by_module()
    for name, (us, count) in list(rows.items())[:12]:
        table.add_row(name, str(count), f"{us / 1e3:.3f}", f"{us / found.total_us:.1%}")
    return table


def _as_dict(found: Profile) -> dict[str, Any]:
    return {
        "total_us": found.total_us,
        "between_us": found.between_us,
        "between_launches_us": found.between_launches_us,
        "guards_us": found.guards_us,
        "runs": found.runs,
        "overhead": found.overhead,
        "threads": torch.get_num_threads(),
        "launches": [
            {
                "name": t.launch.name,
                "kind": t.launch.kind,
                "kernel": t.launch.kernel,
                "module": t.launch.module,
                "begin_us": t.begin_us,
                "median_us": t.median_us,
                "compulsory_nbytes": t.launch.traffic.compulsory_nbytes,
                "gb_per_s": t.gb_per_s,
                "gflop_per_s": t.gflop_per_s,
            }
            for t in found.launches
        ],
    }
