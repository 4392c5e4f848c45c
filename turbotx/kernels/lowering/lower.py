"""Lower: turns a region's nodes into the body of one kernel, starting from elements of its outputs.

In: fx nodes to compute, the nodes to store, and which nodes are loaded. Out: an `ir.Kernel` and its
operands. Each output's element is evaluated at the loop's index; views and transposes only rewrite
that index, so they cost nothing, and equal elements are one value. Example::

    out[row, col] = layer_norm(linear + bias + x)  ->  3 loads, 2 adds, welford, ..., 1 store
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import sympy
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod

from turbotx import ir
from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import ZERO, Expr, is_nonnegative, product
from turbotx.ir.strides import root_layout
from turbotx.ir.views import reshape_index
from turbotx.kernels.lowering.fuse_moments import join_moments
from turbotx.kernels.lowering.simplify_axes import tidy
from turbotx.ops.builder import Element
from turbotx.ops.loop_nest import FusionConflict, LoopNest, NeedsAxisSplit
from turbotx.ops.scalarizer import Scalarizer


@dataclass(frozen=True)
class Lowered:
    """A kernel and the fx nodes behind its params, in the order of `kernel.params`."""

    kernel: ir.Kernel
    operands: tuple[fx.Node, ...]
    requirements: tuple[tuple[Expr, str], ...] = ()


def lower(
    outputs: Sequence[fx.Node], loaded: Callable[[fx.Node], bool], name: str,
    sources: Sequence[str], as_stored: Collection[fx.Node] = (),
) -> Lowered:  # fmt: skip
    """Return one kernel that stores every output; raise FusionConflict if that is not possible.

    loaded(node): whether a tensor node is already in memory. as_stored: computed nodes whose values
    are rounded to their dtype as if they had been stored.
    """
    splits: dict[str, list[Expr]] = {}
    while True:
        try:
            return Lowering(outputs, loaded, splits, as_stored).run(name, sources)
        except NeedsAxisSplit as needed:
            splits[needed.name] = [needed.inner]


class Lowering(Scalarizer):
    """One attempt at one kernel."""

    def __init__(
        self,
        outputs: Sequence[fx.Node],
        loaded: Callable[[fx.Node], bool],
        splits: dict[str, list[Expr]],
        as_stored: Collection[fx.Node],
    ) -> None:
        super().__init__(loaded, LoopNest(splits), as_stored)
        self.outputs = outputs

    def run(self, name: str, sources: Sequence[str]) -> Lowered:
        """Lower the nodes to one kernel called `name`; sources: the nodes' source lines, for its
        header.

        Raises FusionConflict or NeedsAxisSplit if one loop nest does not serve them all.
        """
        first = self._main_output()
        index = {first: self._open_axes(first)}
        for node in self.outputs:
            index.setdefault(node, self._align(node, first, index[first]))
        for node in self.outputs:
            value = self.cast(self.element(node, index[node]), g.dtype(node))
            self._store(node, index[node], value)
        for node in self.outputs:
            self._refuse_repeats(node, first, index[node])
        return self._kernel(name, sources)

    def _refuse_repeats(self, node: fx.Node, first: fx.Node, index: tuple[Expr, ...]) -> None:
        """Raise FusionConflict for an output that another's parallel loops would store repeatedly.

        That costs bytes, and a kernel that overwrites an input must read it only once."""
        used = {s.name for i in index for s in i.free_symbols}
        for axis, extent in self.loops.axes.items():
            if axis not in self.loops.rows and f"@{axis}" not in used:
                raise FusionConflict(
                    node, f"{node.name} would be stored {extent} times by the loops of {first.name}"
                )

    def _main_output(self) -> fx.Node:
        """Return the first output with the most dims, whose shape determines the loops."""
        return max(self.outputs, key=lambda n: sum(extent != 1 for extent in g.shape(n)))

    def _open_axes(self, node: fx.Node) -> tuple[Expr, ...]:
        return tuple(self.loops.make(extent, f"a{d}") for d, extent in enumerate(g.shape(node)))

    def _align(self, node: fx.Node, first: fx.Node, index: tuple[Expr, ...]) -> tuple[Expr, ...]:
        """Return the index of another output in the first one's loops.

        Its dims are the same ones in order, or some of them; or in another order if all extents
        differ; or the same elements in another shape.
        """
        shape, loops = g.shape(node), g.shape(first)
        if product(shape) == product(loops):
            wanted, given = ([e for e in s if e != 1] for s in (shape, loops))
            if wanted != given and sorted(wanted, key=str) != sorted(given, key=str):
                found = list(reshape_index(index, loops, shape, self.split))
                if any(i.has(FloorDiv, Mod) for i in found):
                    raise FusionConflict(
                        node, f"{node.name} shows {first.name}'s elements in parts"
                    )
                return tuple(found)
        free = [(e, i) for e, i in zip(loops, index, strict=True) if e != 1]
        anywhere = len({e for e, _ in free}) == len(free)
        found = []
        for extent in shape:
            if extent == 1:
                found.append(ZERO)
                continue
            k = next((k for k, (e, _) in enumerate(free) if e == extent), None)
            if k is None:
                raise FusionConflict(
                    node, f"{node.name} iterates over other axes than {first.name}"
                )
            found.append(free[k][1])
            free = free[:k] + free[k + 1 :] if anywhere else free[k + 1 :]
        return tuple(found)

    def _store(self, node: fx.Node, index: tuple[Expr, ...], value: Element) -> None:
        if node in self.params:
            raise FusionConflict(node, f"{node.name} is both read and written")
        strides = root_layout(node).strides
        offset = sum((i * s for i, s in zip(index, strides, strict=True)), ZERO)
        name, value = self._param(node), self.before_store(value, g.dtype(node))
        self.body.append(ir.Store(ir.Access(name, sympy.expand(offset)), value.name))

    def _kernel(self, name: str, sources: Sequence[str]) -> Lowered:
        rows = self.loops.rows
        axes = [
            ir.Axis(n, e, ir.REDUCTION if n in rows else ir.PARALLEL)
            for n, e in self.loops.axes.items()
        ]
        ordered = [a for a in axes if a.kind == ir.PARALLEL]
        ordered += [next(a for a in axes if a.name == n) for n in self.loops.rows]
        stored = set(self.outputs)
        params = tuple(
            ir.Param(p, g.dtype(n), g.shape(n), "out" if n in stored else "in")
            for n, p in self.params.items()
        )
        kernel = ir.Kernel(name, params, tuple(ordered), tuple(self.body), tuple(sources))
        kernel, kept = tidy(join_moments(kernel))
        operands = tuple(n for n, p in self.params.items() if p in kept)
        elements = product([a.extent for a in axes if a.kind == ir.PARALLEL])
        needed = {
            r if is_nonnegative(elements - 1) else sympy.Max(r, -elements): text
            for r, text in self.requirements.items()  # none for empty tensors
        }
        return Lowered(kernel, operands, tuple(needed.items()))
