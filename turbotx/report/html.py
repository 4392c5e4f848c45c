"""HTML: a report as one page that needs no network, or as a fragment for a notebook.

In: a `Report`. Out: HTML text, light and dark by the reader's own setting, for example::

    Path("report.html").write_text(report.to_html())
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from turbotx.memory import Buffer, Chunk, Lifetime, Placement, Plan
from turbotx.memory.svg import plan_to_svg
from turbotx.report.table import show_nbytes, show_shape

if TYPE_CHECKING:
    from turbotx.report.entries import Kernel, Memory, Region
    from turbotx.report.report import Report

STYLE = """
.turbotx { --ink: #1d2025; --faint: #6a7079; --line: #dcdfe4; --tint: #f5f6f8; --page: #fff;
  color: var(--ink); font: 14px/1.5 system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { .turbotx { --ink: #e4e6ea; --faint: #9aa1ab;
  --line: #343941; --tint: #1e2126; --page: #16181c; } }
body.turbotx { background: var(--page); margin: 0 auto; max-width: 1080px; padding: 24px; }
.turbotx h1 { font-size: 22px; margin: 0 0 4px; }
.turbotx h2 { font-size: 17px; margin: 28px 0 8px; }
.turbotx p { margin: 4px 0 12px; color: var(--faint); }
.turbotx table { border-collapse: collapse; width: 100%; background: none; color: inherit; }
.turbotx th, .turbotx td { text-align: left; vertical-align: top; padding: 4px 12px 4px 0;
  border-bottom: 1px solid var(--line); font-weight: normal; background: none; }
.turbotx th { color: var(--faint); } .turbotx a { color: inherit; }
.turbotx .number { text-align: right; white-space: nowrap; }
.turbotx code, .turbotx pre { font: 12px/1.45 ui-monospace, monospace; color: inherit; }
.turbotx pre { background: var(--tint); padding: 10px; overflow: auto; max-height: 480px; }
.turbotx details { border-bottom: 1px solid var(--line); padding: 4px 0; }
.turbotx summary { cursor: pointer; } .turbotx summary span { color: var(--faint); }
.turbotx svg { max-width: 100%; height: auto; }
"""


def render_html(report: Report, page: bool = True) -> str:
    """Return the whole page, or with page=False the tables alone for a notebook cell."""
    parts = [_headline(report), _regions(report, page), _gemms(report), _externs(report)]
    parts.append(_memory(report, page))
    if page:
        parts += [_kernels(report), _launches(report)]
    body = "\n".join(p for p in parts if p)
    if not page:
        return f'<div class="turbotx"><style>{STYLE}</style>{body}</div>'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.name)} · turbotx</title><style>{STYLE}</style></head>"
        f'<body class="turbotx">{body}</body></html>\n'
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of cells that are HTML already; `numbers` are the columns aligned right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        marks = [' class="number"' if k in numbers else "" for k in range(len(row))]
        return "".join(f"<{tag}{m}>{c}</{tag}>" for m, c in zip(marks, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def _headline(report: Report) -> str:
    captured = sum(n.kind == "call_function" for n in report.origin.nodes)
    return (
        f"<h1>{escape(report.name)}</h1><p>at {escape(show_shape(report.dims))}: "
        f"{captured} captured ops became {len(report.launches)} launches of {len(report.kernels)} "
        f"generated kernels and {len(report.gemms)} GEMMs</p>"
    )


def _regions(report: Report, page: bool) -> str:
    """Equal regions of different layers are one row."""
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Region]] = {}
    for region in report.regions:
        groups.setdefault((region.ops, region.kernels), []).append(region)
    traffic = {k.name: k.compulsory_nbytes for k in report.kernels}
    rows = []
    for (ops, kernels), regions in groups.items():
        became = "<br>".join(_link(k, page) for k in dict.fromkeys(kernels)) or "PyTorch's ops"
        if regions[0].reason:
            became += f"<br><small>{escape(regions[0].reason)}</small>"
        moved = sum(traffic.get(k, 0) for k in kernels)
        rows.append((escape(" → ".join(ops)), became, str(len(regions)), show_nbytes(moved)))
    head = ("ops between GEMMs", "became", "times", "moves")
    return "<h2>Regions</h2>" + _table(head, rows, (2, 3))


def _link(kernel: str, page: bool) -> str:
    shown = f"<code>{escape(kernel)}</code>"
    return f'<a href="#{escape(kernel)}">{shown}</a>' if page else shown


def _gemms(report: Report) -> str:
    counted: dict[tuple[str, ...], int] = {}
    for g in report.gemms:
        how = f"{len(g.weights)} weights packed into one" if g.packed else escape(g.through)
        key = (str(g.m), str(g.k), str(g.n), how)
        counted[key] = counted.get(key, 0) + 1
    rows = [(*key, str(count)) for key, count in counted.items()]
    return "<h2>GEMMs</h2>" + _table(("m", "k", "n", "weight", "times"), rows, (0, 1, 2, 4))


def _externs(report: Report) -> str:
    if not report.externs:
        return "<h2>Run by PyTorch</h2><p>nothing: every op has a kernel</p>"
    rows = [(escape(x.op), str(x.count), escape(x.reason)) for x in report.externs]
    return "<h2>Run by PyTorch</h2>" + _table(("op", "times", "why"), rows, (1,))


def _memory(report: Report, page: bool) -> str:
    memory = report.memory
    bound = max(memory.lower_bound_nbytes, 1)
    values = (
        ("lower bound: most bytes alive at once", memory.lower_bound_nbytes),
        ("planned peak", memory.peak_nbytes),
        ("PyTorch, the captured ops: alive at once", memory.pytorch.peak_nbytes),
        ("PyTorch, the captured ops: caching allocator", memory.pytorch.reserved_nbytes),
    )
    rows = [(what, show_nbytes(n), f"{n / bound:.3f} ×") for what, n in values]
    table = _table(("", "bytes", "against the bound"), rows, (1, 2))
    picture = plan_to_svg(plan_of(memory), find_layers(report)) if page else ""
    note = f"<p>PyTorch's bytes are computed: {escape(memory.pytorch.method)}</p>" if page else ""
    return f"<h2>Memory of intermediates</h2>{table}{note}{picture}"


def plan_of(memory: Memory) -> Plan:
    """Return the plan behind a memory entry, for the drawing."""
    placements = tuple(
        Placement(Buffer(b.name, b.nbytes, Lifetime(*b.lifetime)), b.offset) for b in memory.buffers
    )
    chunks = tuple(Chunk(*c) for c in memory.chunks)
    return Plan(chunks, placements, memory.peak_nbytes, memory.lower_bound_nbytes)


def find_layers(report: Report) -> Callable[[str], str]:
    """Return a function from a buffer's name to the layer whose launch writes it."""
    module = {w: x.module for x in report.launches for w in x.writes}

    def layer(buffer: str) -> str:
        parts = module.get(buffer, "").split(".")
        ends = [k for k, part in enumerate(parts) if part.isdigit()]
        return ".".join(parts[: ends[0] + 1]) if ends else (parts[0] or "model")

    return layer


def _kernels(report: Report) -> str:
    shown = "".join(_kernel(k) for k in report.kernels)
    return f"<h2>Generated kernels</h2>{shown}"


def _kernel(kernel: Kernel) -> str:
    sources = "".join(
        f"<p>{escape(target)}</p><pre>{escape(text)}</pre>"
        for target, text in kernel.sources.items()
    )
    times = count_of(len(kernel.launches), "launch", "es")
    moved = f"reads {kernel.read_formula} bytes, writes {kernel.written_formula}"
    return (
        f'<details id="{escape(kernel.name)}"><summary><code>{escape(kernel.name)}</code> <span>'
        f"{times}, {show_nbytes(kernel.compulsory_nbytes)} each</span>"
        f"</summary><p>{escape(moved)}</p><pre>{escape(kernel.signature)}</pre>{sources}</details>"
    )


def count_of(count: int, what: str, plural: str = "s") -> str:
    """Return a count with its noun: 1 launch, 6 launches."""
    return f"{count} {what}{'' if count == 1 else plural}"


def _launches(report: Report) -> str:
    rows = [
        (str(k), f"<code>{escape(x.name)}</code>", escape(x.module), escape(x.source),
         show_nbytes(x.traffic.compulsory_nbytes))
        for k, x in enumerate(report.launches)
    ]  # fmt: skip
    table = _table(("", "launch", "module", "computes", "moves"), rows, (0, 4))
    return f"<h2>Launches</h2><details><summary>all {len(rows)}</summary>{table}</details>"
