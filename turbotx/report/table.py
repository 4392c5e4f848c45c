"""Table: a report for the terminal.

In: a `Report`. Out: a rich renderable: a headline, the regions and what each became, the GEMMs,
what PyTorch runs and why, and the memory plan::

    Console().print(report)
"""

from __future__ import annotations

from collections import Counter

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from turbotx.report.amounts import show_cache, show_nbytes, show_shape
from turbotx.report.record import Record


def render_table(report: Record) -> RenderableType:
    """Return the whole report as one renderable."""
    parts: list[RenderableType] = [_headline(report), regions_table(report), _gemms(report)]
    if report.externs:
        parts.append(_externs(report))
    parts.append(memory_table(report))
    if report.cache is not None:
        parts.append(Text(show_cache(report.cache)))
    return Group(*parts)


def _headline(report: Record) -> Text:
    counts = Counter(x.kind for x in report.launches)
    shown = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    text = Text(f"{report.name} at {show_shape(report.dims)}", style="bold")
    if report.target != "cpu":
        text.append(f" for {report.target}")
    text.append(
        f"\n{len(report.ops)} captured ops became {len(report.launches)} launches ({shown})"
    )
    return text


def titled_table(title: str, *columns: Column | str) -> Table:
    """Return an empty table of these columns under a title, as all tables of turbotx look."""
    return Table(*columns, title=title, title_justify="left", title_style="bold")


def right(*names: str, no_wrap: bool = False) -> list[Column]:
    """Return columns of numbers, aligned to the right."""
    return [Column(name, justify="right", no_wrap=no_wrap) for name in names]


def regions_table(report: Record) -> Table:
    """Tabulate regions, one row per kind: equal regions of different layers are one."""
    table = titled_table(
        "Regions", Column("ops between GEMMs", overflow="fold"),
        Column("became", style="cyan", overflow="fold", min_width=20), *right("times", "moves"),
    )  # fmt: skip
    traffic = {k.name: k for k in report.kernels if k.kind != "gemm"}
    for (ops, kernels, became), regions in report.equal_regions().items():
        moved = sum(traffic[k].compulsory_nbytes for k in kernels if k in traffic)
        shown = "\n".join(map(escape, became))
        if regions[0].reason and not regions[0].epilogue_of:
            shown += f"\n[dim]{escape(regions[0].reason)}[/dim]"
        nbytes = show_nbytes(moved) if kernels else "-"
        table.add_row(escape(" → ".join(ops)), shown, str(len(regions)), nbytes)
    for kernel in report.kernels:
        if kernel.kind in ("attention", "product"):
            moved_text = show_nbytes(kernel.compulsory_nbytes)
            table.add_row(kernel.kind, kernel.name, str(len(kernel.launches)), moved_text)
    return table


def _gemms(report: Record) -> Table:
    table = titled_table("GEMMs", *right("m", "k", "n"), "weights", *right("times"))
    rows = Counter((g.m, g.k, g.n, len(g.weights), g.through) for g in report.gemms)
    for (m, k, n, weights, through), count in rows.items():
        shown = f"{weights} packed into one" if weights > 1 else "as it is"
        if through != "packed weight":
            shown = f"through {through}"
        table.add_row(str(m), str(k), str(n), shown, str(count))
    return table


def _externs(report: Record) -> Table:
    table = titled_table("Run by PyTorch", "op", *right("times"), "why")
    for extern in report.externs:
        table.add_row(escape(extern.op), str(extern.count), escape(extern.reason))
    return table


def memory_table(report: Record) -> Table:
    """Tabulate the plan's peak beside its lower bound and PyTorch's memory use for the captured
    ops; then the weights, what is derived from them, and the total."""
    memory = report.memory
    table = titled_table("Memory", "", *right("bytes", "against the bound"))
    bound = max(memory.lower_bound_nbytes, 1)
    chunks = f"{len(memory.chunks)} chunks" if len(memory.chunks) != 1 else "1 chunk"
    rows = [
        ("lower bound of these launches: most bytes alive at once", memory.lower_bound_nbytes),
        (f"planned peak, {len(memory.buffers)} buffers in {chunks}", memory.peak_nbytes),
        ("PyTorch, the captured ops: alive at once", memory.pytorch.peak_nbytes),
        ("PyTorch, the captured ops: caching allocator", memory.pytorch.reserved_nbytes),
    ]
    if memory.scratch_nbytes:
        rows.insert(1, ("  of which sums of split products", memory.scratch_nbytes))
    for what, nbytes in rows:
        table.add_row(what, show_nbytes(nbytes), f"{nbytes / bound:.3f} x")
    table.add_section()
    for what, nbytes in (
        ("weights, the model's own", memory.weights_nbytes),
        ("constants made of them", memory.derived_nbytes),
        ("weights packed for the processor", memory.packed_nbytes),
        ("arena of one call", memory.arena_nbytes),
        ("in all", memory.total_nbytes),
    ):
        table.add_row(what, show_nbytes(nbytes), "")
    return table
