"""`turbotx verify`: every launch and the whole model against float64; shows the worst of each
kernel.

Kernels are also run on large means, rows of minus infinity and denormals. In: MODEL and shapes.
Out: tables; exit code 1 if an error exceeds its bound::

    turbotx verify minilm --shape batch=1,seq=1 --shape batch=4,seq=128
    turbotx verify minilm.ttx --reference minilm
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.table import Column, Table

import turbotx.report as reports
from turbotx.cli.inputs import EXAMPLE_SHAPE, parse_shape, resize, view_at
from turbotx.cli.models import Source
from turbotx.cli.output import OK, WRONG, Output, Steps
from turbotx.engine.optimize import engine_of
from turbotx.errors import InputError
from turbotx.report.amounts import show_shape
from turbotx.report.numerics import FACTOR, ULPS, Error, Numerics
from turbotx.report.table import right, titled_table
from turbotx.saved.load import holds_weights, load
from turbotx.saved.verify import verify_saved

RULE = (
    f"error at most {FACTOR} x eager's own in launches of the kind, plus {ULPS} ulp of the largest "
    "value"
)

UNMEASURED = (
    "n/a: of float64, which no wider type measures; half of the digits agree with PyTorch's own"
)

MAX_NAMED = 8
"""Number of launches with too large errors that the last line names."""


Measured = list[tuple[dict[str, int], Numerics]]
Harsh = dict[str, tuple[Error, ...]]


def verify_model(
    model: Source, reference: str | None, shapes: Sequence[str], output: Output
) -> int:
    """Measure at every shape; return 0, or 1 if an error exceeds its bound.

    reference: for a saved file, the model that it was saved from, with the dtype and weights of
    `model`. Raises InputError for one without the other.
    """
    if model.is_saved and reference is None:
        raise InputError(
            f"{model} is compiled already and holds no graph to compute in float64: name the model "
            "that it was saved from, as --reference minilm"
        )
    if reference is not None and not model.is_saved:
        raise InputError("--reference is for a .ttx file; any other MODEL is its own reference")
    wanted = [parse_shape(text) for text in shapes]
    with output.steps(f"load {model}", total=3 + max(1, len(wanted))) as steps:
        if reference is None:
            found, harsh = _measure(model, wanted, steps)
        else:
            source = replace(model, text=reference)
            found, harsh = _measure_saved(Path(model.text), source, wanted or [{}], steps), {}
    return _report(model, found, harsh, output)


def _measure(
    model: Source, wanted: Sequence[dict[str, int]], steps: Steps
) -> tuple[Measured, Harsh]:
    """Return the errors at every shape, and on numerically difficult inputs."""
    found: Measured = []
    loaded = model.load({**EXAMPLE_SHAPE, **(wanted[0] if wanted else {})})
    steps("capture, fuse and build")
    run = loaded.optimized()
    report = reports.explain(run, *loaded.args, **loaded.kwargs)
    for view in [view_at(report, dims) for dims in wanted] or [report]:
        steps(f"run launch by launch in float64 at {show_shape(view.dims)}")
        args, kwargs = resize(view, loaded.args, loaded.kwargs)
        found.append((view.dims, view.numerics(run, *args, **kwargs)))
    steps("run kernels on inputs that break careless arithmetic")
    return found, view.stress(*args, **kwargs)


def _measure_saved(
    path: Path, source: Source, wanted: Sequence[dict[str, int]], steps: Steps
) -> Measured:
    """Return the errors of a saved file's outputs at every shape."""
    found: Measured = []
    for dims in wanted:
        loaded = source.load({**EXAMPLE_SHAPE, **dims})
        steps(f"run the file, and {source} in float64")
        engine = engine_of(loaded.model)
        saved = load(path, weights=None if holds_weights(path) else engine.model)
        found.append(verify_saved(saved, engine, loaded.args, loaded.kwargs))
    return found


def _report(model: Source, found: Measured, harsh: Harsh, output: Output) -> int:
    """Print the tables and the errors that exceed their bounds; return the exit code."""
    for dims, numerics in found:
        output.console.print(numerics_table(show_shape(dims), numerics))
    if harsh:
        output.console.print(harsh_table(harsh))
    holds = print_verdict(list(_all_errors(found, harsh)), output)
    for dims, numerics in found:
        for x in numerics.likenesses:
            output.console.print(
                f"{x.name} at {show_shape(dims)}: cosine to the float model's in float64 "
                f"{x.mean:.6f} on average, {x.worst:.6f} at worst, over {x.rows} rows: what "
                "quantisation costs, which the rule says nothing about",
                soft_wrap=True, highlight=False,
            )  # fmt: skip
    adversarial = {case: _errors(errors) for case, errors in harsh.items()}
    output.result({
        "model": str(model), "rule": RULE, "holds": holds, "shapes": _as_dicts(found),
        "adversarial": adversarial,
    })  # fmt: skip
    return OK if holds else WRONG


def print_verdict(every: Sequence[tuple[Error, str]], output: Output) -> bool:
    """Print the rule, whether all errors satisfy it, and those that do not; return whether all do.

    every: errors, and where each was measured.
    """
    broken = [f"{error.name} {where}" for error, where in every if not error.holds]
    holds = not broken
    verdict = "[green]holds[/green]" if holds else "[red bold]is broken[/red bold]"
    output.console.print(f"{RULE}: {verdict}", soft_wrap=True)
    if any(not error.applies for error, _ in every):
        output.console.print(UNMEASURED, soft_wrap=True, highlight=False)
    if broken:
        named = ", ".join(broken[:MAX_NAMED])
        more = f" and {len(broken) - MAX_NAMED} more" if len(broken) > MAX_NAMED else ""
        output.console.print(f"too large: {named}{more}", soft_wrap=True, highlight=False)
    return holds


def _all_errors(
    found: Sequence[tuple[dict[str, int], Numerics]], harsh: Mapping[str, Sequence[Error]]
) -> Iterator[tuple[Error, str]]:
    """Yield every measured error, and where it was measured."""
    for dims, numerics in found:
        for error in (*numerics.launches, *numerics.outputs):
            yield error, f"at {show_shape(dims)}"
    for case, errors in harsh.items():
        for error in errors:
            yield error, f"on {case}"


def worst_of_each(errors: Sequence[Error]) -> list[Error]:
    """Return the worst launch of every kernel, with GEMMs counted as one."""
    worst: dict[str, Error] = {}
    for error in errors:
        key = error.kernel or error.name.rstrip("0123456789").rstrip("_")
        kept = worst.get(key)
        rank = (not error.holds, error.relative)
        if kept is None or rank > (not kept.holds, kept.relative):
            worst[key] = error
    return list(worst.values())


def numerics_table(shape: str, numerics: Numerics) -> Table:
    """Tabulate the worst launch of every kernel, then the model's outputs."""
    worst = Column("worst launch", overflow="fold", min_width=16)
    numbers = right("eager", "turbotx", "relative", "allowed", no_wrap=True)
    table = titled_table(f"Against float64 at {shape}", Column("", no_wrap=True), worst, *numbers)
    for error in (*worst_of_each(numerics.launches), *numerics.outputs):
        table.add_row(
            _mark(error),
            error.name,
            *(f"{x:.2e}" for x in (error.eager, error.turbotx, error.relative, error.allowed)),
        )
    return table


def harsh_table(harsh: Mapping[str, Sequence[Error]]) -> Table:
    """Tabulate, per case and kernel, the error that is largest relative to its bound."""
    kernel = Column("kernel", overflow="fold", min_width=16)
    numbers = right("eager", "turbotx", "allowed", no_wrap=True)
    marks = Column("", no_wrap=True)
    table = titled_table("On adversarial inputs", marks, "case", kernel, *numbers)
    for case, errors in harsh.items():
        for error in worst_of_each(errors):
            table.add_row(
                _mark(error), case, error.name,
                *(f"{x:.2e}" for x in (error.eager, error.turbotx, error.allowed)),
            )  # fmt: skip
    return table


def _mark(error: Error) -> str:
    if error.holds and not error.applies:
        return "[yellow]n/a[/yellow]"
    return "[green]ok[/green]" if error.holds else "[red bold]too large[/red bold]"


def _errors(errors: Sequence[Error]) -> list[dict[str, Any]]:
    return [{**asdict(e), "relative": e.relative, "holds": e.holds} for e in errors]


def _as_dicts(found: Sequence[tuple[dict[str, int], Numerics]]) -> list[dict[str, Any]]:
    return [
        {
            "dims": dims,
            "launches": _errors(numerics.launches),
            "outputs": _errors(numerics.outputs),
            "likenesses": [asdict(x) for x in numerics.likenesses],
        }
        for dims, numerics in found
    ]
