"""`turbotx verify`: every launch and the whole model against float64, the worst of each kernel.

Kernels are also run on large means, rows of minus infinity and denormals. In: MODEL and shapes.
Out: tables; exit code 1 where an error is larger than the rule allows::

    turbotx verify minilm --shape batch=1,seq=1 --shape batch=4,seq=128
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

import turbotx.report as reports
from turbotx.cli.inputs import EXAMPLE_SHAPE, parse_shape, resize, view_at
from turbotx.cli.models import Source
from turbotx.cli.output import OK, WRONG, Output
from turbotx.report.amounts import show_shape
from turbotx.report.numerics import FACTOR, ULPS, Error, Numerics

RULE = (
    f"error at most {FACTOR} x eager's own in launches of the kind, plus {ULPS} ulp of the largest "
    "value"
)

UNMEASURED = (
    "n/a: of float64, which no wider type measures; half of the digits agree with PyTorch's own"
)

MAX_NAMED = 8
"""Launches past the rule that the last line names."""


def verify_model(model: Source, shapes: Sequence[str], output: Output) -> int:
    """Measure at every shape; return 0, or 1 where the rule is broken."""
    wanted = [parse_shape(text) for text in shapes]
    found: list[tuple[dict[str, int], Numerics]] = []
    with output.steps(f"load {model}", total=3 + max(1, len(wanted))) as steps:
        loaded = model.load({**EXAMPLE_SHAPE, **(wanted[0] if wanted else {})})
        steps("capture, fuse and build")
        run = loaded.optimized()
        report = reports.explain(run, *loaded.args, **loaded.kwargs)
        for view in [view_at(report, dims) for dims in wanted] or [report]:
            steps(f"run launch by launch in float64 at {show_shape(view.dims)}")
            args, kwargs = resize(view, loaded.args, loaded.kwargs)
            found.append((view.dims, view.numerics(run, *args, **kwargs)))
        steps("run kernels on inputs that break careless arithmetic")
        harsh = view.stress(*args, **kwargs)
    for dims, numerics in found:
        output.console.print(numerics_table(show_shape(dims), numerics))
    output.console.print(harsh_table(harsh))
    every = list(_all_errors(found, harsh))
    broken = [f"{error.name} {where}" for error, where in every if not error.holds]
    holds = not broken
    verdict = "[green]holds[/green]" if holds else "[red bold]is broken[/red bold]"
    output.console.print(f"{RULE}: {verdict}", soft_wrap=True)
    for dims, numerics in found:
        for x in numerics.likenesses:
            output.console.print(
                f"{x.name} at {show_shape(dims)}: cosine to the float model's in float64 "
                f"{x.mean:.6f} on average, {x.worst:.6f} at worst, over {x.rows} rows: what "
                "quantisation costs, which the rule says nothing about",
                soft_wrap=True, highlight=False,
            )  # fmt: skip
    if any(not error.applies for error, _ in every):
        output.console.print(UNMEASURED, soft_wrap=True, highlight=False)
    if broken:
        named = ", ".join(broken[:MAX_NAMED])
        more = f" and {len(broken) - MAX_NAMED} more" if len(broken) > MAX_NAMED else ""
        output.console.print(f"too large: {named}{more}", soft_wrap=True, highlight=False)
    adversarial = {case: _errors(errors) for case, errors in harsh.items()}
    output.result({
        "model": str(model), "rule": RULE, "holds": holds, "shapes": _as_dicts(found),
        "adversarial": adversarial,
    })  # fmt: skip
    return OK if holds else WRONG


def _all_errors(
    found: Sequence[tuple[dict[str, int], Numerics]], harsh: Mapping[str, Sequence[Error]]
) -> Iterator[tuple[Error, str]]:
    """Yield every error that was measured, and where."""
    for dims, numerics in found:
        for error in (*numerics.launches, *numerics.outputs):
            yield error, f"at {show_shape(dims)}"
    for case, errors in harsh.items():
        for error in errors:
            yield error, f"on {case}"


def worst_of_each(errors: Sequence[Error]) -> list[Error]:
    """Return the worst launch of every kernel, GEMMs as one."""
    worst: dict[str, Error] = {}
    for error in errors:
        key = error.kernel or error.name.rstrip("0123456789").rstrip("_")
        kept = worst.get(key)
        rank = (not error.holds, error.relative)
        if kept is None or rank > (not kept.holds, kept.relative):
            worst[key] = error
    return list(worst.values())


def numerics_table(shape: str, numerics: Numerics) -> Table:
    """One row a kernel: its worst launch; then the model's outputs."""
    table = Table(title=f"Against float64 at {shape}", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("worst launch", overflow="fold", min_width=16)
    for name in ("eager", "turbotx", "relative", "allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    for error in (*worst_of_each(numerics.launches), *numerics.outputs):
        table.add_row(
            _mark(error),
            error.name,
            *(f"{x:.2e}" for x in (error.eager, error.turbotx, error.relative, error.allowed)),
        )
    return table


def harsh_table(harsh: Mapping[str, Sequence[Error]]) -> Table:
    """One row a case and kernel whose error is the largest relative to its rule."""
    table = Table(title="On adversarial inputs", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("case")
    table.add_column("kernel", overflow="fold", min_width=16)
    for name in ("eager", "turbotx", "allowed"):
        table.add_column(name, justify="right", no_wrap=True)
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
