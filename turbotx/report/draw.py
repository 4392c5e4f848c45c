r"""Draw: the fused graph as boxes and arrows, one box a launch-sized node, layers as they flow.

In: a `Report`. Out: self-contained SVG; Graphviz's DOT, for other layout tools::

    draw_dot(report)  ->  'digraph BertModel { "linear_37" [label="linear\n(...)"]; ...'
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.attention_ops import attention, attention_scores, attention_values
from turbotx.ir.printer import show_expr
from turbotx.passes.partition import GEMMS, op_name
from turbotx.report.amounts import find_leaders
from turbotx.report.layered import LayeredDrawing, lay_out
from turbotx.report.record import Record
from turbotx.report.where import find_place

FILL = {
    "region": "#cfe3ff", "gemm": "#ffe2b8", "attention": "#d9f2d0", "input": "#eeeeee",
    "output": "#eeeeee", "other": "#ffffff",
}  # fmt: skip

BOX_HEIGHT, TITLE_HEIGHT, LETTER, MAX_LETTERS, MARGIN = 40.0, 26.0, 6.6, 40, 12.0
STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #24292f; text-anchor: middle; }
  .text { font-size: 10.5px; fill: #57606a; } .page { fill: #fff; } rect.box { stroke: #888; }
  path { fill: none; stroke: #888; stroke-width: 1.1; }
  @media (prefers-color-scheme: dark) { .page { fill: #16181c; } }
"""


@dataclass(frozen=True)
class Box:
    """A node of the drawing.

    kind: a key of FILL.
    name: as in report.graph.
    text: ops or a shape.
    sources: the boxes whose values it reads.
    """

    name: str
    kind: str
    title: str
    text: str
    tip: str
    sources: tuple[str, ...]


def find_boxes(report: Record) -> list[Box]:
    """Return the fused graph's nodes in order, without parameters and views."""
    graph = report.graph.graph
    found = []
    hoisted = report.compiled.assembly.hoisted  # computed once, from parameters alone
    kinds = {n: _kind(report, n) for n in graph.nodes if n.name not in hoisted}
    shown = {n: kind for n, kind in kinds.items() if kind}
    sources: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        given = [n for n in node.all_input_nodes if n in shown or not _is_size(n)]
        feeding = [s for n in given for s in ([n] if n in shown else sources[n])]
        sources[node] = list(dict.fromkeys(feeding))
        if node in shown:
            above = tuple(s.name for s in sources[node])
            found.append(Box(node.name, shown[node], *_label(report, node), above))
    return found


def draw_dot(report: Record) -> str:
    """Return the fused graph as DOT."""
    lines = [
        f'digraph "{report.name}" {{',
        '  rankdir=TB; bgcolor="transparent"; node [shape=box, style="rounded,filled", '
        'fontname="Helvetica", fontsize=11, color="#888888"]; edge [color="#888888"];',
    ]
    for box in find_boxes(report):
        label = "\\n".join([box.title, *(_wrap(box.text) if box.text else [])])
        lines.append(
            f'  "{box.name}" [label="{label}", tooltip="{box.tip}", fillcolor="{FILL[box.kind]}"];'
        )
        lines += [f'  "{source}" -> "{box.name}";' for source in box.sources]
    return "\n".join([*lines, "}"]) + "\n"


def _kind(report: Record, node: fx.Node) -> str:
    """Return the kind of box of a node, "" if it is not drawn."""
    if node.op in ("placeholder", "output"):
        return "input" if node.op == "placeholder" else "output"
    if node.op == "call_module":
        return "region"
    if node.target in GEMMS or node.target in (attention_scores, attention_values):
        return "gemm"
    if node.target is attention:
        return "attention"
    tensors = g.is_tensor(node) or isinstance(node.meta.get("val"), (list, tuple))
    if node.op != "call_function" or not tensors or node.target is g.GETITEM:
        return ""
    # A reshape that strides cannot express is a launch.
    return "" if g.is_view(node) and find_place(report, node).status != "aten" else "other"


def _is_size(node: fx.Node) -> bool:
    """Sizes are known from the shape: reading one does not depend on its tensor."""
    return node.op == "call_function" and isinstance(node.meta.get("val"), torch.SymInt)


def _label(report: Record, node: fx.Node) -> tuple[str, str, str]:
    """Return title, text and tooltip."""
    if node.op == "output":
        return "output", "", "output"
    if node.op == "call_module":
        region = next(r for r in report.regions if r.name == node.target)
        return node.name, " → ".join(region.ops), " ".join(region.nodes)
    title = node.name if node.op == "placeholder" else op_name(node)
    shape = ", ".join(show_expr(e) for e in g.shape(node)) if g.is_tensor(node) else ""
    for name, leader in find_leaders(report.dims).items():
        shape = re.sub(rf"\b{name}\b", leader, shape)
    return title, f"({shape})", node.name


def _wrap(text: str, width: int = 46) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


@dataclass(frozen=True)
class Drawing:
    """Boxes, their (width, height), and their positions."""

    boxes: list[Box]
    sizes: dict[str, tuple[float, float]]
    layout: LayeredDrawing


def lay_out_boxes(report: Record) -> Drawing:
    """Return the fused graph's boxes laid out from top to bottom."""
    boxes = find_boxes(report)
    sizes = {b.name: (_width(b), BOX_HEIGHT if b.text else TITLE_HEIGHT) for b in boxes}
    return Drawing(boxes, sizes, lay_out(sizes, [(s, b.name) for b in boxes for s in b.sources]))


def shorten(text: str) -> str:
    """Return as much of a box's text as fits."""
    return text if len(text) <= MAX_LETTERS else text[: MAX_LETTERS - 1] + "…"


def _width(box: Box) -> float:
    return max(96.0, 24 + LETTER * max(len(box.title), len(shorten(box.text)) * 0.88))


def draw_svg(report: Record) -> str:
    """Return the fused graph as standalone SVG; hovering over a box shows its contents."""
    drawing = lay_out_boxes(report)
    width, height = drawing.layout.width + 2 * MARGIN, drawing.layout.height + 2 * MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img" '
        f'aria-label="The fused graph of {escape(report.name)}">',
        f'<style>{STYLE}</style><rect class="page" width="100%" height="100%"/>',
        f'<g transform="translate({MARGIN:.0f} {MARGIN:.0f})">',
        *_arrows(drawing),
        *(line for box in drawing.boxes for line in _box(drawing, box)),
    ]
    return "\n".join([*lines, "</g></svg>"]) + "\n"


def _arrows(drawing: Drawing) -> Iterator[str]:
    """Draw curves from the bottom of a box, through the bends, to the top of another."""
    for (a, b), bends in drawing.layout.bends.items():
        (x, y), (end, below) = drawing.layout.centres[a], drawing.layout.centres[b]
        y, below = y + drawing.sizes[a][1] / 2, below - drawing.sizes[b][1] / 2
        path = f"M{x:.1f} {y:.1f}"
        for to_x, to_y in (*bends, (end, below)):
            middle = (y + to_y) / 2
            path += f" C{x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {to_y:.1f}"
            x, y = to_x, to_y
        tip = f"M{x - 3:.1f} {y - 6:.1f} L{x:.1f} {y:.1f} L{x + 3:.1f} {y - 6:.1f}"
        yield f'<path d="{path} {tip}"/>'


def _box(drawing: Drawing, box: Box) -> Iterator[str]:
    (x, y), (width, height) = drawing.layout.centres[box.name], drawing.sizes[box.name]
    yield (
        f'<rect class="box" x="{x - width / 2:.1f}" y="{y - height / 2:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}" rx="5" fill="{FILL[box.kind]}"><title>{escape(box.tip)}</title>'
        "</rect>"
    )
    yield f'<text x="{x:.1f}" y="{y - 4 if box.text else y + 4:.1f}">{escape(box.title)}</text>'
    if box.text:
        yield f'<text class="text" x="{x:.1f}" y="{y + 12:.1f}">{escape(shorten(box.text))}</text>'
