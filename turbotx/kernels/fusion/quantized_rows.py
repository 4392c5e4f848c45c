"""Quantized rows: decides which launch quantizes the rows of a quantized product.

In: a graph with quantized products of float rows. Out: rows that a kernel computes anyway are
quantized by that kernel: after a norm both are one kernel, and the row is read once. Rows from a
GEMM's epilogue or attention are quantized by the product that reads them::

    layer_norm -> quantized_linear   ->  layer_norm, row_scale, quantize_rows in one kernel
    linear, gelu -> quantized_linear ->  as it is: the gelu stays the first product's epilogue

On a GPU a product cannot: each tile of its columns would have to read whole rows first. There
kernels quantize all rows, and a GELU moves from the epilogue into that kernel if that moves no more
bytes::

    linear, gelu -> quantized_linear ->  gelu, row_scale, quantize_rows in one kernel
"""

from __future__ import annotations

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import product
from turbotx.ir.quantized_ops import LEVELS, quantize_rows, quantized_linear, row_scale
from turbotx.ir.strides import has_plain_rows, layout_with_copies
from turbotx.kernels.fusion.epilogue import Epilogue, is_packable, match_epilogue
from turbotx.kernels.heuristics import DEFAULT
from turbotx.passes.partition import BEGINS, Region, find_hoisted, kind_of, partition, root_of


def place_quantization(graph: fx.Graph) -> None:
    """Move the quantization of rows into the kernel that computes them, if there is one."""
    for x, found in _find_rows(graph).items():
        some, region, end = found
        whole = product(g.shape(x)) == product(g.shape(root_of(x)))
        made_by_kernel = region is not None and whole and end is None
        if made_by_kernel or len(some) > 1 or not has_plain_rows(layout_with_copies(x)):
            _quantize_apart(x, some)


def quantize_all_rows(graph: fx.Graph) -> None:
    """Let kernels quantize all rows that `place_quantization` left to products."""
    for x, (some, _, end) in _find_rows(graph).items():
        _quantize_apart(x, some, begins=end is not None and _keeps_epilogue(end))


Found = tuple[list[fx.Node], Region | None, Epilogue | None]


def _find_rows(graph: fx.Graph) -> dict[fx.Node, Found]:
    """Return the float inputs of quantized products, each with its products, the region that
    computes it, and the epilogue it could be."""
    products = [
        n for n in graph.nodes
        if g.is_call(n, quantized_linear) and n.args[4] is None
        and g.dtype(g.operand(n, 0)) not in LEVELS
    ]  # fmt: skip
    if not products:
        return {}
    hoisted = find_hoisted(graph)
    kinds = {n: kind_of(n, hoisted) for n in graph.nodes}
    home = {n: region for region in partition(graph, hoisted) for n in region.nodes}
    found: dict[fx.Node, Found] = {}
    for node in products:
        x = g.operand(node, 0)
        if x not in found:
            region = home.get(root_of(x))
            found[x] = [], region, None if region is None else _epilogue(region, kinds)
        found[x][0].append(node)
    return found


def _epilogue(region: Region, kinds: dict[fx.Node, str]) -> Epilogue | None:
    """Return a region as the epilogue of a GEMM, None if it is not one."""
    if len(region.outputs) != 1:
        return None
    ends = (match_epilogue(region, n, kinds) for n in region.inputs if is_packable(n, kinds))
    return next((end for end in ends if end is not None), None)


def _keeps_epilogue(end: Epilogue) -> bool:
    """Return whether the GEMM keeps its epilogue and a kernel only quantizes.

    For a gated layer yes: its sums have twice the bytes of its result. Otherwise the bytes are the
    same, and the memory-bound kernel has time for an activation, which slows a GEMM (H200, float16
    at 4096 x 3072 x 768: 480 TFLOP/s with a GELU, 590 without); but a row too long for registers is
    read twice and would be activated twice.
    """
    size, width, sums = (
        g.dtype(end.output).itemsize, g.shape(end.output)[-1], g.shape(end.linear)[-1],
    )  # fmt: skip
    added = 0 if end.residual is None else size * width
    reads = 1 if int(width) <= DEFAULT.persistent else 2
    by_gemm = size * width * (1 + reads) + added
    by_kernel = size * sums * (1 + reads) + added * reads
    return bool(by_gemm < by_kernel) or reads > 1


def _quantize_apart(x: fx.Node, products: list[fx.Node], begins: bool = False) -> None:
    first = min(products)
    with x.graph.inserting_before(first):
        narrow = g.dtype(g.operand(first, 1))
        kind = () if narrow is torch.int8 else (narrow,)
        scale = g.emit(first, row_scale, x, *kind)
        rows = g.emit(first, quantize_rows, x, scale, *kind)
    for node in (scale, rows) if begins else ():
        node.meta[BEGINS] = True
    for node in products:
        node.args = (rows, *node.args[1:4], scale, node.args[5])
