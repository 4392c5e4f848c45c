"""Quantized rows: decides which launch quantizes the rows of a quantized product.

In: a graph with quantized products of float rows. Out: rows that a kernel computes anyway are
quantized by that kernel: after a norm both are one kernel, and the row is read once. Rows from a
GEMM's epilogue or attention are quantized by the product that reads them::

    layer_norm -> quantized_linear   ->  layer_norm, row_scale, quantize_rows in one kernel
    linear, gelu -> quantized_linear ->  as it is: the gelu stays the first product's epilogue

On a GPU a product cannot, unless it is given the largest magnitudes of its rows (`row_peaks.py`):
each tile of its columns would have to read whole rows first. There a kernel quantizes such rows::

    linear, gelu -> quantized_linear ->  the same, with row_scale, quantize_rows in a kernel between
"""

from __future__ import annotations

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import product
from turbotx.ir.quantized_ops import LEVELS, quantize_rows, quantized_linear, row_scale
from turbotx.ir.strides import has_plain_rows, layout_with_copies
from turbotx.kernels.fusion.epilogue import Epilogue, is_packable, match_epilogue
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
    """Quantize in kernels all rows that `place_quantization` left to products."""
    for x, (some, _, end) in _find_rows(graph).items():
        # The GEMM finishes its sums: H200, BERT-base float16 at 32 x 128, 1,411 us a call; 1,593
        # if a kernel computes the GELU before it quantizes.
        _quantize_apart(x, some, begins=end is not None)


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
