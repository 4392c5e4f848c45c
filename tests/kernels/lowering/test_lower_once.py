"""Lower once: equal nodes of two layers share one kernel; whatever differs is lowered again."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from turbotx.ir import fx_nodes as g
from turbotx.kernels.fusion.sources import name_kernel
from turbotx.kernels.lowering.lower import Lowered, lower
from turbotx.kernels.lowering.lower_once import LowerOnce

aten = torch.ops.aten


class Layers:
    """A graph of a few calls on tensors, each with its kernel."""

    def __init__(self) -> None:
        self.graph, self.mode, self.known = fx.Graph(), FakeTensorMode(), LowerOnce()

    def tensor(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        node = self.graph.get_attr(name)
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return g.emit(next(iter(self.graph.nodes)), target, *args, **kwargs)

    def lower(self, node: fx.Node, **kwargs: Any) -> Lowered:
        """Return the kernel of a node, which is the one that `lower` makes, over the same nodes."""
        given: Any = ([node], lambda n: n.op == "get_attr", name_kernel([node]), ())
        found = self.known.lower(*given, **kwargs)
        assert found == lower(*given, **kwargs)
        return found


def test_equal_layers_share_a_kernel_over_their_own_tensors() -> None:
    made = Layers()
    first, second = (
        [made.tensor(f"layers.{k}.x", 4, 8), made.tensor(f"layers.{k}.bias", 8)] for k in range(2)
    )
    kernels = [
        made.lower(made.call(aten.mul.Tensor, made.call(aten.add.Tensor, *layer), 2.0))
        for layer in (first, second)
    ]
    assert kernels[0].kernel is kernels[1].kernel
    assert kernels[0].operands[:2] == tuple(first) and kernels[1].operands[:2] == tuple(second)


def test_what_differs_is_lowered_again() -> None:
    made = Layers()
    x, y = (made.tensor(f"layers.{k}.x", 4, 8) for k in range(2))
    half, wide = made.tensor("layers.2.x", 4, 8, dtype=torch.half), made.tensor("layers.3.x", 4, 9)
    turned, named = made.tensor("layers.4.x", 4, 8), made.tensor("layers.5.y", 4, 8)
    with made.mode:
        turned.meta["val"] = torch.empty(8, 4).t()
    calls = [
        made.call(aten.add.Tensor, x, y),
        made.call(aten.add.Tensor, x, x),
        made.call(aten.add.Tensor, half, half),
        made.call(aten.add.Tensor, wide, wide),
        made.call(aten.add.Tensor, x, turned),
        made.call(aten.add.Tensor, x, named),
        made.call(aten.add.Tensor, x, 1),
        made.call(aten.add.Tensor, x, 1.0),
        made.call(aten.add.Tensor, x, 0.0),
        made.call(aten.add.Tensor, x, -0.0),
        made.call(aten.add.Tensor, x, y, alpha=2),
        made.call(aten.add.Tensor, x, made.call(aten.select.int, y, 0, 0)),
        made.call(aten.add.Tensor, x, made.call(aten.select.int, y, 0, 1)),
        made.call(aten.sub.Tensor, x, y),
    ]
    kernels = [made.lower(node).kernel for node in calls]
    assert len({id(kernel) for kernel in kernels}) == len(calls)


def test_a_value_that_is_rounded_as_stored_makes_another_kernel() -> None:
    made = Layers()
    x = made.tensor("x", 4, 8, dtype=torch.half)
    inner = made.call(aten.mul.Tensor, x, 3.0)
    out = made.call(aten.exp.default, inner)
    plain, rounded = made.lower(out), made.lower(out, as_stored=frozenset({inner}))
    assert plain.kernel != rounded.kernel
