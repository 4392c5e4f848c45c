"""`turbotx compile`: every stage of a model as files, for any target, on any machine.

In: MODEL, shapes, targets, a folder. Out: captured.txt, fused.txt, kernels/, memory_plan.json,
report.json, report.html and more, for example::

    turbotx compile minilm --shape batch=4,seq=128 --out out --save minilm.ttx
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import turbotx.report as reports
from turbotx.cli.inputs import EXAMPLE_SHAPE, parse_shape, resize, view_at
from turbotx.cli.models import Source
from turbotx.cli.output import OK, WRONG, Output
from turbotx.cli.save import chosen_options, chosen_targets, show_written, write_file
from turbotx.cli.targets import (
    build_jobs,
    find_jobs,
    parse_targets,
    resources_of,
    resources_table,
    write_builds,
)
from turbotx.cli.verify import print_verdict
from turbotx.engine.optimize import engine_of, optimize
from turbotx.errors import InputError
from turbotx.memory.planner.svg import plan_to_svg
from turbotx.report.amounts import show_shape
from turbotx.report.dump import STAGES, Dumped, check_file, make_folder, stage_text
from turbotx.report.layers import find_layers, plan_of
from turbotx.report.report import Report, explain_call
from turbotx.saved.contents import read_contents


def compile_model(
    model: Source,
    out: Path,
    shapes: Sequence[str],
    targets: Sequence[str],
    verify: bool,
    save: Path | None,
    packed: bool,
    output: Output,
) -> int:
    """Dump everything and print where it is; return the exit code, 1 if `verify` finds errors.

    The program is that of the first GPU among the targets, or the CPU's.
    save: also write one file for `turbotx.load` there.
    packed: the program over tokens. Raises InputError if `verify` would have to run launches of an
    absent GPU.
    """
    _refuse_mixtures(model, targets, verify, save, packed)
    saved_for = chosen_targets(targets) if save is not None else []
    check_file(save)
    wanted, gpus = [parse_shape(text) for text in shapes], parse_targets(targets)
    make_folder(out)
    if model.is_saved:
        return _unpack(model, out, wanted, output)
    with output.steps(f"load {model}", total=6) as steps:
        loaded = model.load({**EXAMPLE_SHAPE, **(wanted[0] if wanted else {})})
        steps("capture, fuse and build")
        run = optimize(loaded.model, **chosen_options(loaded, packed))
        engine = engine_of(run)
        report = explain_call(engine, loaded.args, loaded.kwargs, next(iter(gpus), None))
        views = [view_at(report, dims) for dims in wanted] or [report]
        named = find_jobs(views[0], engine, gpus)
        steps.expect(len(named) + verify)
        built = build_jobs(named, steps)
        views[0] = views[0].with_findings(resources=resources_of(built))
        if verify:
            steps("run launch by launch in float64")
            args, kwargs = resize(views[0], loaded.args, loaded.kwargs)
            numerics = views[0].numerics_of(engine, args, kwargs)
            views[0] = views[0].with_findings(numerics=numerics)
        steps("write files")
        dumped = views[0].dump(out)
        for dims, view in zip(wanted[1:], views[1:], strict=True):
            dumped.files += write_plan(view, dims, out)
        dumped.files += write_builds(built, out)
        written = {} if save is None else write_file(loaded, save, saved_for, steps, packed)
    output.console.print(views[0])
    if built:
        output.console.print(resources_table(built))
    output.console.print(f"\n{len(dumped.files)} files in {dumped.folder}/: begin with report.html")
    if written:
        output.console.print(show_written(written))
    output.result({**summarize(str(model), views, dumped), **written, "targets": gpus})
    found = views[0].findings.numerics
    if found is None:
        return OK
    where = f"at {show_shape(views[0].dims)}"
    errors = [(error, where) for error in (*found.launches, *found.outputs)]
    return OK if print_verdict(errors, output) else WRONG


def _refuse_mixtures(
    model: Source, targets: Sequence[str], verify: bool, save: Path | None, packed: bool
) -> None:
    """Raise InputError for options that cannot be combined, or not with a saved file."""
    if model.is_saved and (targets or verify or packed or save is not None):
        raise InputError(
            f"{model} is compiled already: with --out alone its programs, sources, cubins and "
            "plans are written; for anything else name the model that it was saved from"
        )
    gpus = parse_targets(targets)
    if verify and gpus:
        raise InputError(
            f"--verify runs every launch, and {gpus[0]} is not here: leave out --verify, or the "
            "--target, to verify the CPU's program"
        )


def _unpack(model: Source, out: Path, wanted: Sequence[Mapping[str, int]], output: Output) -> int:
    """Write the contents of a saved file, which has no graphs and therefore no report.html."""
    if len(wanted) > 1:
        raise InputError("of a saved file, the memory plans are of one --shape at a time")
    files = read_contents(Path(model.text), wanted[0] if wanted else {})
    for name, data in files.items():
        make_folder((out / name).parent)
        (out / name).write_bytes(data)
    output.console.print(files["programs.txt"].decode(), markup=False, highlight=False, end="")
    output.console.print(
        f"\n{len(files)} files in {out}/: what the file holds, which is no graph and no report"
    )
    output.result({"model": str(model), "out": str(out), "files": sorted(files)})
    return OK


def print_stage(model: Source, stage: str, shapes: Sequence[str], output: Output) -> int:
    """Print one stage on standard output and write nothing; with --json, as {"stage", "text"}.
    Raises InputError for an unknown stage, several shapes, or a saved file."""
    if stage not in STAGES:
        raise InputError(f"--stage {stage!r} is not one of {', '.join(STAGES)}")
    if model.is_saved:
        raise InputError(
            f"{model} is compiled already and holds no stages: --out DIR writes its programs, "
            "sources and plans"
        )
    if len(shapes) > 1:
        raise InputError("--stage prints one --shape at a time")
    wanted = parse_shape(shapes[0]) if shapes else {}
    with output.steps(f"load {model}", total=2) as steps:
        loaded = model.load({**EXAMPLE_SHAPE, **wanted})
        steps("capture, fuse and build")
        report = view_at(reports.explain(loaded.optimized(), *loaded.args, **loaded.kwargs), wanted)
    text = stage_text(report, stage)
    if not output.as_json:
        sys.stdout.write(text)
        if not text:
            why = "what lies between the GEMMs is part of their launches, or runs in PyTorch"
            output.errors.print(f"no kernel was generated: {why}")
    output.result({"model": str(model), "stage": stage, "dims": report.dims, "text": text})
    return OK


def write_plan(report: Report, dims: Mapping[str, int], folder: Path) -> list[Path]:
    """Write the memory plan of a further shape beside the first one's."""
    shape = "_".join(f"{name}{size}" for name, size in dims.items())
    plan = plan_of(report.memory)
    table, picture = folder / f"memory_plan_{shape}.json", folder / f"memory_plan_{shape}.svg"
    table.write_text(json.dumps(plan.to_dict(), indent=1) + "\n", encoding="utf-8")
    picture.write_text(plan_to_svg(plan, find_layers(report)), encoding="utf-8")
    return [table, picture]


def summarize(model: str, views: Sequence[Report], dumped: Dumped) -> dict[str, Any]:
    """Return the object printed by `--json`; the whole report is in report.json."""
    first = views[0]
    return {
        "model": model,
        "name": first.name,
        "out": str(dumped.folder),
        "files": [str(f.relative_to(dumped.folder)) for f in dumped.files],
        "launches": len(first.launches),
        "kernels": [k.name for k in first.kernels],
        "externs": [{"op": e.op, "count": e.count, "reason": e.reason} for e in first.externs],
        "shapes": [
            {
                "dims": view.dims,
                "peak_nbytes": view.memory.peak_nbytes,
                "lower_bound_nbytes": view.memory.lower_bound_nbytes,
                "pytorch_peak_nbytes": view.memory.pytorch.peak_nbytes,
            }
            for view in views
        ],
    }
