"""Sources: descriptions of a kernel's ops, by name and by the user's source lines.

In: the region's nodes, and which of them are already stored. Out: the kernel's name, and the lines
of its header, one for each line of the user's source, in call order::

    fused_add_layer_norm    "bert/modeling_bert.py:301: add, layer_norm"
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.passes.partition import op_name, root_of, tensor_inputs


def find_computed(
    outputs: Sequence[fx.Node], members: Collection[fx.Node], stored: Collection[fx.Node]
) -> list[fx.Node]:
    """Return the members that a kernel with these outputs computes, in dependency order."""
    seen: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        root = root_of(node)
        if root in seen or root not in members or (root in stored and root not in outputs):
            return
        for source in tensor_inputs(root):
            visit(source)
        seen[root] = None

    for output in outputs:
        visit(output)
    return list(seen)


def name_kernel(computed: Sequence[fx.Node]) -> str:
    """Return `fused_` and the last four ops, without repetition."""
    names = [op_name(n) for n in computed]
    short = [n for k, n in enumerate(names) if k == 0 or n != names[k - 1]]
    return "_".join(["fused", *short[-4:]])


def describe_sources(computed: Sequence[fx.Node]) -> tuple[str, ...]:
    """Return one text line per source line; calls without a line of the user's come separately.

    Only the last two parts of a file's path are shown, so that the text does not depend on the
    machine.
    """
    lines: dict[str, list[str]] = {}
    for node in computed:
        place = "/".join(g.place_of(node).replace("\\", "/").split("/")[-2:])
        lines.setdefault(place, []).append(op_name(node))
    return tuple(
        f"{place}: {', '.join(ops)}" if place else ", ".join(ops) for place, ops in lines.items()
    )
