"""Assemble: converts the partitioned graph to a flat list of launches over named tensors.

In: the rewritten graph, its fused regions, its hoisted constants. Out: an `Assembly`: tensors,
launches in order, outputs, and requirements on the dims. For a BERT layer::

    linear (gemm), attention, linear (gemm), fused_add_layer_norm, linear (gemm), ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from sympy import Integer
from torch import fx

from turbotx import ir
from turbotx.capture.result_layouts import (
    ASKED,
    ORDER,
    READS,
    RETURNS,
    Alias,
    Fresh,
    are_equal_strides,
    strides_of,
    tensor_arguments,
)  # fmt: skip
from turbotx.ir import fx_nodes as g
from turbotx.ir.attention_ops import attention_scores
from turbotx.ir.cache_ops import cache_store, store_rows
from turbotx.ir.expert_ops import grouped_linear
from turbotx.ir.expr import ONE, ZERO, Expr
from turbotx.ir.quantized_ops import QUANTIZED_LINEARS
from turbotx.ir.strides import contiguous_strides, layout_with_copies
from turbotx.ir.views import SPLITS, is_view
from turbotx.kernels.cpp.attention import describe_attention
from turbotx.kernels.cpp.products import describe_product
from turbotx.kernels.fusion.epilogue import Epilogue, bias_of, is_packable
from turbotx.kernels.fusion.fuse import FusedRegion
from turbotx.kernels.fusion.inplace import find_inplace
from turbotx.ops import OPS, takes_any_layout, why_outside
from turbotx.passes.outputs import copied_leaves
from turbotx.passes.partition import kind_of, op_name
from turbotx.program.assembly import Assembly, dense, over, whole
from turbotx.program.cache_stores import describe_blocks, describe_store, find_blocks, require_room
from turbotx.program.copies import lay_out, lay_out_returned, show_by_strides
from turbotx.program.gemms import make_gemm
from turbotx.program.sequences import SEQUENCE_OPS, make_launch

aten = torch.ops.aten


def assemble(
    graph: fx.Graph, fused: Sequence[FusedRegion], hoisted: frozenset[fx.Node],
    dims: Sequence[str], epilogues: Mapping[fx.Node, Epilogue] | None = None,
) -> Assembly:  # fmt: skip
    """Return the launches of a partitioned graph in dependency order.

    epilogues: by linear, the region that its launch also computes.
    """
    return _Assembler(graph, fused, hoisted, dims, epilogues or {}).run()


class _Assembler:
    def __init__(
        self, graph: fx.Graph, fused: Sequence[FusedRegion], hoisted: frozenset[fx.Node],
        dims: Sequence[str], epilogues: Mapping[fx.Node, Epilogue],
    ) -> None:  # fmt: skip
        self.graph, self.hoisted, self.epilogues = graph, hoisted, epilogues
        self.ends = {e.output: e for e in epilogues.values()}
        self.dims, self.names = set(dims), dict[str, int]()
        self.kinds = {n: kind_of(n, hoisted) for n in graph.nodes}
        self.done: set[Any] = set()
        self.region_of = {n: f for f in fused for n in f.region.nodes}
        draws = [n for n in graph.nodes if g.is_random(n)]
        self.drawn_before = dict(zip(draws[1:], draws, strict=False))
        self.out = Assembly()
        (self.output,) = graph.find_nodes(op="output")
        self.leaves: Any = self.output.args[0]
        self.returns: Any = self.output.meta.get(RETURNS) or [None] * len(self.leaves)
        self.copied = copied_leaves(self.output, self.kinds)
        # Nodes whose memory is returned to the caller.
        self.outside = {
            layout_with_copies(leaf).root
            for k, (leaf, returned) in enumerate(zip(self.leaves, self.returns, strict=True))
            if g.is_tensor(leaf) and k not in self.copied and type(returned) is not Alias
        }

    def run(self) -> Assembly:
        for node in self.graph.nodes:
            kind = self.kinds[node]
            if kind in ("input", "parameter", "hoisted"):
                self._tensor(node, kind)
                if kind == "input":
                    self.out.orders[node.name] = node.meta.get(ORDER)
                    if (strides := node.meta.get(ASKED)) is not None:
                        self.out.raw[node.name] = strides
                if kind == "hoisted":
                    self.out.hoisted[node.name] = node
        for node in self.graph.nodes:
            self._ensure(node)
        return self.out

    def _ensure(self, node: fx.Node) -> None:
        """Emit the launches that compute `node`, after those of its inputs.

        A region's launches may have to precede or follow calls that lie between its nodes.
        """
        region = self.region_of.get(node)
        unit: Any = node if region is None else id(region)
        if unit in self.done:
            return
        self.done.add(unit)
        if node in self.drawn_before:  # random numbers are drawn in the model's order
            self._ensure(self.drawn_before[node])
        for needed in node.all_input_nodes if region is None else region.region.needs:
            self._ensure(needed)
        kind = self.kinds[node]
        if region is not None:
            end = self.ends.get(region.region.outputs[-1])
            self._kernels(region) if end is None else self._gemm(end.linear, end)
        elif kind == "gemm" and node not in self.epilogues:
            self._gemm(node)
        elif kind == "attention":
            self._attention(node)
        elif kind == "product":
            self._product(node)
        elif kind == "route":
            self._route(node)
        elif kind == "store":
            self._store(node)
        elif kind == "extern" and node.target not in SPLITS:
            self._extern(node, why_outside(node))
        elif kind == "output":
            self._return()

    # --- tensors and operands ---

    def _tensor(self, node: fx.Node, kind: str | None = None) -> str:
        if node.target is cache_store:
            return self._tensor(g.operand(node, 0))
        if node.name in self.out.tensors:
            return node.name
        if kind is None:
            kind = "output" if node in self.outside else "intermediate"
        shape = g.shape(node)
        self.out.tensors[node.name] = ir.Tensor(node.name, kind, g.dtype(node), shape)
        return node.name

    def _operand(self, node: fx.Node) -> ir.Operand:
        layout = layout_with_copies(node)
        if is_view(layout.root):
            self._materialize(layout.root)
        return replace(over(layout, g.dtype(node)), tensor=self._tensor(layout.root))

    def _materialize(self, view: fx.Node) -> None:
        """Add a copy, by ATen, of a view that strides cannot express; once, and reported."""
        if view.name not in self.out.tensors:
            source = self._operand(g.operand(view, 0))
            name, shape = self._tensor(view), list(g.shape(view))
            self._aten(view, aten.reshape.default, (source, shape), {}, (name,))
            self.out.externs.append((g.target_name(view), "a view that needs a copy"))

    def _name(self, base: str) -> str:
        k = self.names.get(base, 0)
        self.names[base] = k + 1
        return f"{base}_{k}"

    # --- launches ---

    def _kernels(self, fused: FusedRegion) -> None:
        for lowered in fused.kernels:
            kernel = lowered.kernel
            args = tuple(self._whole(n) for n in lowered.operands)
            named = {p.name: n for n, p in zip(lowered.operands, kernel.params, strict=True)}
            last = next(named[p.name] for p in reversed(kernel.params) if p.role == "out")
            source = ", ".join(n.name for n in fused.region.nodes)
            inplace = tuple((named[a].name, named[b].name) for a, b in find_inplace(kernel))
            place = self._place(last, kernel.name, source)
            self.out.launches.append(
                ir.KernelLaunch(kernel, args, lowered.operands, **place, inplace=inplace)
            )
            self.out.requirements += lowered.requirements

    def _whole(self, node: fx.Node) -> ir.Operand:
        return whole(node, self.out.tensors[self._tensor(node)])

    def _place(self, node: fx.Node, base: str, source: str = "") -> dict[str, Any]:
        """Return the name and origin of the launch that computes a node."""
        named = {"name": self._name(base), "source": source or node.name}
        return {**named, "module": g.module_of(node)}

    def _gemm(self, node: fx.Node, end: Epilogue | None = None) -> None:
        if not is_packable(node, self.kinds):
            own = (aten.linear.default, grouped_linear, *QUANTIZED_LINEARS)
            self._fallback(node, out=node.target not in own)
            return
        end = end or Epilogue(node, node, (node,), bias_of(node))
        place = self._place(end.output, end.name, ", ".join(n.name for n in end.nodes))
        out = self._whole(end.output)
        self.out.launches.append(make_gemm(end, self._operand, out, place))

    def _route(self, node: fx.Node) -> None:
        """Add the launch that sorts rows by expert, or the PyTorch op."""
        pieces, chosen = {u.args[1]: u for u in node.users}, self._operand(g.operand(node, 0))
        if len(pieces) < 3 or chosen.strides != (ONE,):
            self._extern(node, "only all of its results, of dense rows, are counted natively")
            return
        order, place, ends = (self._whole(pieces[k]) for k in range(3))
        call = replace(self._call(node, order), writes=(order, place, ends))
        named = self._place(node, "route")
        self.out.launches.append(ir.RouteLaunch(chosen, order, place, ends, call, **named))

    def _attention(self, node: fx.Node) -> None:
        keys, bias = g.optional(node, 3), g.optional(node, 4)
        shown = None if keys is None else self._rows(keys)
        added = None if bias is None else self._operand(bias)
        sinks = g.optional(node, 5)
        sunk = None if sinks is None else self._rows(sinks)
        q, k, v = (self._rows(g.operand(node, i)) for i in range(3))
        self._require_equal("q's and k's batch", q.shape[0], k.shape[0])
        self._require_equal("k's and v's batch", k.shape[0], v.shape[0])
        self._require_equal("k's and v's length", k.shape[2], v.shape[2])
        if added is not None and len(node.args) <= 6:  # the bias of packed attention is per column
            scores = (*q.shape[:3], k.shape[2])
            for given, size in zip(reversed(added.shape), reversed(scores), strict=False):
                self._require_equal("a bias of attention and its scores", given, size)
        out = self._whole(node)
        sequences = tuple(self._operand(g.operand(node, i)) for i in range(6, len(node.args)))
        said = (shown, added, sunk, node.kwargs, sequences)
        kernel, sizes = describe_attention((q, k, v, out), *said)
        blocks, of_blocks = find_blocks(node, self._tensor)
        if blocks:
            kernel, sizes = replace(kernel, cached=True), (*sizes, *of_blocks)
        call, place = self._call(node, out), self._place(node, op_name(node))
        self.out.launches.append(
            ir.AttentionLaunch(
                kernel, q, k, v, out, shown, added, sunk, sizes, call, sequences, blocks, **place
            )
        )

    def _product(self, node: fx.Node) -> None:
        which = "scores" if node.target is attention_scores else "values"
        a, b = (self._rows(g.operand(node, i)) for i in range(2))
        self._require_equal("the batch of attention's operands", a.shape[0], b.shape[0])
        if which == "values":
            self._require_equal("k's and v's length", a.shape[3], b.shape[2])
        out = self._whole(node)
        kernel, sizes = describe_product(which, a, b, out)
        place = self._place(node, f"attention_{which}")
        self.out.launches.append(
            ir.ProductLaunch(kernel, a, b, out, sizes, self._call(node, out), **place)
        )

    def _store(self, node: fx.Node) -> None:
        """Add the launch that appends new rows to one layer of a cache."""
        held, new = self._operand(node), self._rows(g.operand(node, 2))
        call = ir.AtenCall(store_rows, self._arguments(node.args), {}, ())
        sizes, place = describe_store(held, new), self._place(node, "cache_store")
        *blocks, of_blocks = describe_blocks(node, self._tensor)
        self.out.requirements.append(require_room(held, *of_blocks))
        sizes = (*sizes, *of_blocks, Integer(new.dtype.itemsize))
        self.out.launches.append(ir.StoreLaunch(held, new, sizes, call, tuple(blocks), **place))

    def _call(self, node: fx.Node, out: ir.Operand, has_out: bool = False) -> ir.AtenCall:
        """Return the node's own call, run by PyTorch."""
        target: Any = node.target
        args = self._arguments(node.args)
        return ir.AtenCall(target, args, dict(node.kwargs), (out,), has_out)

    def _require_equal(self, what: str, a: Expr, b: Expr) -> None:
        """Require two sizes that kernels treat as one to be equal, unless one of them is 1."""
        if ONE not in (a, b):
            for less in {(a - b).expand(), (b - a).expand()} - {ZERO}:
                self.out.requirements.append((less, f"{a} = {b} ({what})"))

    def _rows(self, node: fx.Node) -> ir.Operand:
        """Return an operand whose last dim is contiguous."""
        operand = self._operand(node)
        side_by_side = operand.strides[-1] == 1 or operand.shape[-1] == 1
        if side_by_side:
            return operand
        reason = "attention reads elements side by side"
        return self._laid_out(node, contiguous_strides(operand.shape), reason)

    # --- through ATen ---

    def _fallback(self, node: fx.Node, out: bool) -> None:
        """Add a GEMM that the native kernels do not support, as PyTorch's op."""
        args, kwargs = self._arguments(node.args), self._arguments(node.kwargs)
        self._aten(node, node.target, args, kwargs, (self._tensor(node),), out=out)

    def _extern(self, node: fx.Node, reason: str) -> None:
        if node.target is aten.as_strided.default:
            self._as_strided(node)
            return
        laid_out = self._read_strides(node)
        args, kwargs = self._arguments((node.args, node.kwargs), laid_out)
        if isinstance(node.meta["val"], torch.Tensor):
            writes: tuple[Any, ...] = (self._tensor(node),)
        else:
            pieces = {u.args[1]: u for u in node.users if u.target is g.GETITEM}
            count = len(node.meta["val"])
            writes = tuple(self._tensor(pieces[i]) if i in pieces else "" for i in range(count))
        self._aten(node, node.target, args, kwargs, writes)
        self.out.externs.append((g.target_name(node), reason))

    def _read_strides(self, node: fx.Node) -> list[Any]:
        """Return eager's strides of each tensor argument, None if any will do."""
        given = tensor_arguments(node)
        if node.target in SEQUENCE_OPS:
            return [contiguous_strides(g.shape(n)) for n in given]
        if node.target in OPS or takes_any_layout(node.target):
            return [None] * len(given)
        noted = node.meta.get(READS, ())  # recorded before passes replaced a clone by its source
        return list(noted if len(noted) == len(given) else map(strides_of, given))

    def _as_strided(self, node: fx.Node) -> None:
        """Add a copy of a strided window on an argument's memory, laid out as in eager."""
        given = tensor_arguments(node)[0]
        source = self._laid_out(given, node.meta[READS][0])
        window, rest = show_by_strides(node, given, source)
        self.out.requirements.append((rest, f"{node.name} within the memory of {given.name}"))
        if self.kinds[given] == "input":
            self.out.raw.setdefault(given.name, False)
        self._aten(node, aten.clone.default, (window,), {}, (self._tensor(node),))
        self.out.externs.append((g.target_name(node), "reads memory by strides of the call's own"))

    def _laid_out(
        self, node: fx.Node, strides: Sequence[Expr] | None,
        reason: str = "an op that PyTorch runs reads it as eager's",
    ) -> ir.Operand:  # fmt: skip
        """Return an operand with these strides (None: any), copied if it has others."""
        operand = self._operand(node)
        if strides is None or are_equal_strides(operand.shape, operand.strides, strides):
            return operand
        tensor, window = lay_out(self._name(f"{node.name}_copied"), operand, strides)
        self.out.tensors[tensor.name] = tensor
        self._copy_into(node, "laid_out", operand, window)
        self.out.externs.append((g.target_name(node), reason))
        return window

    def _copy_into(self, node: fx.Node, base: str, source: ir.Operand, window: ir.Operand) -> None:
        call = ir.AtenCall(aten.clone.default, (source,), {}, (window,))
        self.out.launches.append(ir.AtenLaunch(call, **self._place(node, base)))

    def _arguments(self, args: Any, laid_out: list[Any] | None = None) -> Any:
        """Replace tensor nodes by operands and size nodes by expressions.

        laid_out: the strides of each tensor in order, None if any will do.
        """

        def convert(n: fx.Node) -> Any:
            if g.is_tensor(n):
                return self._laid_out(n, laid_out.pop(0)) if laid_out else self._operand(n)
            if isinstance(n.meta.get("val"), (list, tuple)):
                return [self._operand(p) for p in n.users]
            return g.size(n)

        return fx.node.map_arg(args, convert)

    def _aten(
        self, node: fx.Node, target: Any, args: Any, kwargs: Any, writes: tuple[str, ...],
        out: bool = False,
    ) -> None:  # fmt: skip
        results = tuple(dense(self.out.tensors[w]) if w else None for w in writes)
        call = ir.AtenCall(target, tuple(args), dict(kwargs), results, out)
        self.out.launches.append(make_launch(node, call, self._place(node, op_name(node))))

    def _return(self) -> None:
        for k, leaf in enumerate(self.leaves):
            made = g.size(leaf) if isinstance(leaf, fx.Node) and not g.is_tensor(leaf) else leaf
            if isinstance(self.returns[k], Alias):
                made = self.returns[k]
            elif k in self.copied:
                made = self._copy_out(leaf, self.copied[k])
            elif g.is_tensor(leaf):
                made = self._operand(leaf)
            self.out.outputs.append(made)

    def _copy_out(self, leaf: fx.Node, fresh: Fresh) -> ir.Operand:
        """Copy a leaf into memory laid out as in eager, shared with other views of that memory."""
        if fresh.overlaps:  # overlapping windows cannot be written
            fresh = fresh.apart(leaf.name)
        name = f"{fresh.memory}_returned"
        tensor, source, written, leaves = lay_out_returned(name, self._operand(leaf), fresh)
        self.out.tensors.setdefault(name, tensor)
        self._copy_into(leaf, "returned", source, written)
        self.out.externs.append((g.target_name(leaf), "what is returned lies otherwise in eager"))
        return leaves
