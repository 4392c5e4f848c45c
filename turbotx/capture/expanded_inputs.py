"""Expanded inputs: when a result lies otherwise because an input is expanded.

In: a captured graph, traced with dense inputs. Out: the inputs whose dims of stride 0 would change
the strides of a result. Such a dim has no place in the order of a loop, so that the other operands
decide it::

    y = torch.randn(4, 3).t();  torch.randn(3, 4) + y         ->  strides (4, 1)
    torch.randn(3, 1).expand(3, 4) + y                        ->  strides (1, 3)

A call with such an input is traced again, with one element of each of these dims, expanded.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from turbotx.capture.result_layouts import RETURNS, Fresh, owner_of
from turbotx.ir import fx_nodes as g
from turbotx.ir.memory_order import expanded_dims

aten = torch.ops.aten

_DENSE = frozenset(
    (
        aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default,
        aten.addmm.default, aten.baddbmm.default, aten.scaled_dot_product_attention.default,
        aten.layer_norm.default, aten.rms_norm.default, aten.embedding.default,
    )
)  # fmt: skip
"""Ops that lay out their result in one way, whatever their arguments' strides are."""


@dataclass(frozen=True)
class ExpandedInputs:
    """The dims of some inputs, by index, that a trace took as expanded.

    decisive: the inputs of which it matters which dims are expanded.
    """

    dims: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    decisive: frozenset[int] = frozenset()

    def serve(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether a call's tensors are expanded as in the trace, where that matters."""
        return all(dims == self.dims.get(k, ()) for k, dims in self.of(tensors).dims.items())

    def of(self, tensors: Sequence[torch.Tensor]) -> ExpandedInputs:
        """Return the same inputs, with the dims of a call that are expanded."""
        places = {*self.dims, *self.decisive}
        return ExpandedInputs({k: expanded_dims(tensors[k]) for k in places})

    def expand(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return a trace's inputs, with one element of each expanded dim expanded to all."""
        made = list(tensors)
        for k, dims in self.dims.items():
            for d in dims:
                made[k] = made[k].narrow(d, 0, 1)
            made[k] = made[k].expand(tensors[k].shape)
        return made


def find_decisive(graph: fx.Graph) -> frozenset[int]:
    """Return the inputs that could, expanded or not, change the strides of a result.

    graph: with the layouts of its results noted.
    """
    shown: dict[fx.Node, frozenset[int]] = {}
    decided: dict[fx.Node, frozenset[int]] = {}
    none = frozenset[int]()
    inputs = {node: k for k, node in enumerate(graph.find_nodes(op="placeholder"))}
    for node in graph.nodes:
        if not g.is_tensor(node):
            continue
        source = owner_of(node)
        given = [n for n in node.all_input_nodes if g.is_tensor(n)]
        shown[node] = none if source is None else shown.get(source, none)
        decided[node] = none
        if node in inputs:
            shown[node] = frozenset((inputs[node],))
        elif source is not None:
            decided[node] = decided.get(source, none)
        elif node.target not in _DENSE:
            decided[node] = none.union(*(decided.get(n, none) for n in given))
            looped = torch.Tag.pointwise in getattr(node.target, "tags", ())
            seen = none.union(*(shown.get(n, none) for n in given)) if looped else none
            if seen and _disagree(given):
                decided[node] |= seen
    output: Any = graph.output_node()
    fresh = zip(output.args[0], output.meta[RETURNS], strict=True)
    return none.union(*(decided[n] for n, made in fresh if isinstance(made, Fresh)))


def _disagree(operands: Sequence[fx.Node]) -> bool:
    """Return whether the order of a loop depends on which operand decides it."""
    wide = [n for n in operands if len(g.shape(n)) > 1]
    return len(wide) > 1 and not all(map(_is_in_order, wide))


def _is_in_order(node: fx.Node) -> bool:
    """Return whether a tensor's dims, apart from expanded ones, lie in their own order."""
    sizes = zip(g.shape(node), g.strides(node), strict=True)
    kept = [s for n, s in sizes if n != 1 and s != 0]
    hints = [int(s.subs(dict.fromkeys(s.free_symbols, 7))) for s in kept]
    return all(a >= b for a, b in itertools.pairwise(hints))
