"""HTML: a report as a self-contained page, or in short form for a notebook.

In: a `Report`. Out: HTML text. The page consists of the files in `page/`: its scripts draw the
graph, and evaluate traffic and memory at any shape, from data embedded in it::

    Path("report.html").write_text(report.to_html())
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from turbotx.memory.planner.svg import plan_to_svg
from turbotx.report.amounts import show_cache, show_nbytes, show_shape
from turbotx.report.layers import find_layers, plan_of
from turbotx.report.page_data import page_data
from turbotx.report.record import Record
from turbotx.report.where import find_place

SCRIPTS = (
    "shape.js", "graph.js", "overview.js", "selected.js", "roofline.js", "memory.js", "start.js",
)  # fmt: skip

# Notebooks have light and dark themes, so only the colours of kinds are set here.
STYLE = """
.turbotx { font: 13px/1.5 system-ui, sans-serif; max-width: 900px; }
.turbotx table { border-collapse: collapse; margin: 6px 0 14px; font-size: inherit; }
.turbotx th, .turbotx td { text-align: left; vertical-align: top; padding: 3px 14px 3px 0;
  border-bottom: 1px solid rgba(128, 128, 128, .3); font-weight: normal; background: none; }
.turbotx th, .turbotx .faint { opacity: .7; }
.turbotx .number { text-align: right; white-space: nowrap; }
.turbotx svg { max-width: 100%; height: auto; } .turbotx summary { cursor: pointer; }
"""
COLOURS = {
    "kernel": "#4f8fd9", "gemm": "#e8a33d", "attention": "#5fae57", "aten": "#d4574f",
    "product": "#8fbf5a", "route": "#3fb0ac", "store": "#8a6fc0", "not needed": "#a9afb8",
}  # fmt: skip


def render_page(report: Record) -> str:
    """Return the whole page, including the report's findings."""
    folder = Path(__file__).parent / "page"
    templates = Environment(loader=FileSystemLoader(folder), undefined=StrictUndefined)
    # In a script element only "</" needs escaping.
    data = json.dumps(page_data(report), separators=(",", ":")).replace("</", "<\\/")
    page = templates.get_template("page.html")
    return page.render(model=escape(report.name), data=data, scripts=SCRIPTS) + "\n"


def render_miniature(report: Record) -> str:
    """Return a fragment without scripts: what became of the ops, the regions, the memory plan."""
    parts = [_headline(report), _ribbons(report), _regions(report), _externs(report)]
    parts.append(_memory(report))
    return f'<div class="turbotx"><style>{STYLE}</style>{"".join(parts)}</div>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Return a table of HTML cells; `numbers` are the right-aligned columns."""

    def cells(tag: str, row: Sequence[str]) -> str:
        marks = [' class="number"' if k in numbers else "" for k in range(len(row))]
        return "".join(f"<{tag}{m}>{c}</{tag}>" for m, c in zip(marks, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def _headline(report: Record) -> str:
    return (
        f"<div><b>{escape(report.name)}</b> at {escape(show_shape(report.dims))}: "
        f"{report.eager.launches} launches of PyTorch became {len(report.launches)}, of "
        f"{len(report.kernels)} generated "
        f"kernels and {len(report.gemms)} GEMMs</div>"
    )


def _ribbons(report: Record) -> str:
    """Draw every launch as a cell in execution order, PyTorch's above, turbotx's below."""
    kinds = {x.name: x.kind for x in report.launches}
    above = []
    for node in report.origin.nodes:
        if node.makes_memory:
            place = find_place(report, node.name)
            kind = kinds[place.launches[0]] if place.launches else "not needed"
            above.append(
                (COLOURS[kind], f"{node.op} → {', '.join(place.launches) or place.status}")
            )
    below = [(COLOURS[x.kind], f"{x.name} ({x.module})") for x in report.launches]
    width = 880 / max(len(above), len(below), 1)
    cells = [
        f'<rect x="{k * width:.2f}" y="{y}" width="{max(width - 0.8, 0.4):.2f}" height="16" '
        f'fill="{colour}"><title>{escape(text)}</title></rect>'
        for y, row in ((0, above), (20, below))
        for k, (colour, text) in enumerate(row)
    ]
    shown = set(kinds.values()) | ({"not needed"} if len(above) > len(below) else set())
    keys = "".join(
        f'<span style="margin-right:14px"><span style="display:inline-block;width:9px;height:9px;'
        f'background:{c};margin-right:4px"></span>{escape(k)}</span>'
        for k, c in COLOURS.items()
        if k in shown
    )
    return (
        f'<svg viewBox="0 0 880 36" width="880" role="img" aria-label="launches before and after">'
        f'{"".join(cells)}</svg><div class="faint">{keys}</div>'
    )


def _regions(report: Record) -> str:
    """Tabulate regions; equal regions of different layers are one row."""
    traffic = {k.name: k.compulsory_nbytes for k in report.kernels}
    rows = []
    for (ops, kernels, words), regions in report.equal_regions().items():
        became = "<br>".join(f"<code>{escape(k)}</code>" if kernels else escape(k) for k in words)
        if regions[0].reason and not regions[0].epilogue_of:
            became += f"<br><small>{escape(regions[0].reason)}</small>"
        moved = sum(traffic.get(k, 0) for k in kernels)
        shown = escape(" → ".join(ops))
        nbytes = show_nbytes(moved) if kernels else "-"
        rows.append((shown, became, str(len(regions)), nbytes))
    return _table(("ops between GEMMs", "became", "times", "moves"), rows, (2, 3))


def _externs(report: Record) -> str:
    rows = [(escape(x.op), str(x.count), escape(x.reason)) for x in report.externs]
    return _table(("run by PyTorch", "times", "why"), rows, (1,)) if rows else ""


def _memory(report: Record) -> str:
    memory = report.memory
    if not memory.buffers:
        return f"<div>Memory of intermediates: none is needed</div>{_cache(report)}"
    times = memory.pytorch.peak_nbytes / max(memory.peak_nbytes, 1)
    picture = plan_to_svg(plan_of(memory), find_layers(report))
    return (
        f"<details><summary>Memory of intermediates: {show_nbytes(memory.peak_nbytes)}, "
        f"{memory.peak_nbytes / max(memory.lower_bound_nbytes, 1):.3f} × the lower bound; PyTorch "
        f"would hold {times:.1f} × as much</summary>{picture}</details>{_cache(report)}"
    )


def _cache(report: Record) -> str:
    return "" if report.cache is None else f"<div>{show_cache(report.cache)}</div>"
