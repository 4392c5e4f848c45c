"""Draw: the fused graph in Graphviz's DOT, one box a launch-sized node, layers as they flow.

In: a `Report`. Out: DOT text; `draw_svg` hands it to Graphviz where that is installed::

    draw_dot(report)  ->  'digraph BertModel { "linear_37" [label="linear\\n(...)"]; ...'
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from turbotx import graph as g
from turbotx.attention import attention, attention_scores, attention_values
from turbotx.errors import TurbotxError
from turbotx.passes.partition import GEMMS, op_name
from turbotx.report.entries import Region
from turbotx.report.record import Record
from turbotx.report.where import find_place
from turbotx.show import show_expr

FILL = {
    "region": "#cfe3ff", "gemm": "#ffe2b8", "attention": "#d9f2d0", "input": "#eeeeee",
    "output": "#eeeeee", "other": "#ffffff",
}  # fmt: skip


class DrawError(TurbotxError):
    """Graphviz is not installed, or refused the graph."""


@dataclass(frozen=True)
class Box:
    """A node of the drawing. kind: a key of FILL. name: as in report.graph. text: ops or a shape.

    sources: the boxes whose values it reads.
    """

    name: str
    kind: str
    title: str
    text: str
    tip: str
    sources: tuple[str, ...]


def find_boxes(report: Record) -> list[Box]:
    """Return the fused graph's nodes but for parameters and the views between calls, in order."""
    graph = report.graph.graph
    found = []
    regions = {r.name: r for r in report.regions}
    prepared = report.compiled.assembly.prepared  # computed once, from parameters alone
    kinds = {n: _kind(report, n) for n in graph.nodes if n.name not in prepared}
    shown = {n: kind for n, kind in kinds.items() if kind}
    sources: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        given = [n for n in node.all_input_nodes if n in shown or not _is_size(n)]
        feeding = [s for n in given for s in ([n] if n in shown else sources[n])]
        sources[node] = list(dict.fromkeys(feeding))
        if node in shown:
            above = tuple(s.name for s in sources[node])
            found.append(Box(node.name, shown[node], *_label(regions, node), above))
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
    """Return what a node is drawn as, "" for those that are drawn through."""
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
    # A reshape that no strides express is a launch of its own.
    return "" if _is_view(node) and find_place(report, node).status != "aten" else "other"


def _is_size(node: fx.Node) -> bool:
    """Sizes are known from the shape alone: who uses one does not wait for its tensor."""
    return node.op == "call_function" and isinstance(node.meta.get("val"), torch.SymInt)


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info for r in schema.returns)


def _label(regions: Mapping[str, Region], node: fx.Node) -> tuple[str, str, str]:
    """Return title, text and tip."""
    if node.op == "output":
        return "output", "", "output"
    if node.op == "call_module":
        region = regions[str(node.target)]
        return node.name, " → ".join(region.ops), " ".join(region.nodes)
    title = node.name if node.op == "placeholder" else op_name(node)
    shape = ", ".join(show_expr(e) for e in g.shape(node)) if g.is_tensor(node) else ""
    return title, f"({shape})", node.name


def _wrap(text: str, width: int = 46) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def draw_svg(report: Record) -> str:
    """Return the fused graph as SVG; raise DrawError where Graphviz is missing."""
    dot = shutil.which("dot")
    if dot is None:
        raise DrawError("fused.svg needs Graphviz's dot: install the package graphviz")
    done = subprocess.run(
        [dot, "-Tsvg"], input=draw_dot(report), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise DrawError(f"dot failed with exit code {done.returncode}: {done.stderr.strip()[:200]}")
    return done.stdout
