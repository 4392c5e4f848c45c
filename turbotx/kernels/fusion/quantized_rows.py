"""Quantized rows: which launch turns the rows of a quantised product into int8.

In: a graph with quantised products that take floats. Out: the rows of those come as int8 that a
kernel makes anyway: behind a norm both are one kernel, and the row is read once. Rows that a
GEMM's epilogue or attention makes are quantised by the product that reads them::

    layer_norm -> quantized_linear   ->  layer_norm, row_scale, quantize_rows in one kernel
    linear, gelu -> quantized_linear ->  as it is: the gelu stays the first product's epilogue
"""

from __future__ import annotations

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import product
from turbotx.ir.quantized_ops import quantize_rows, quantized_linear, row_scale
from turbotx.ir.strides import has_plain_rows, layout_with_copies
from turbotx.kernels.fusion.epilogue import is_packable, match_epilogue
from turbotx.passes.partition import Region, find_hoisted, kind_of, partition, root_of


def place_quantization(graph: fx.Graph) -> None:
    """Move the quantisation of rows into the kernel that makes them, where one does."""
    products = [n for n in graph.nodes if g.is_call(n, quantized_linear) and n.args[4] is None]
    if not products:
        return
    hoisted = find_hoisted(graph)
    kinds = {n: kind_of(n, hoisted) for n in graph.nodes}
    home = {n: region for region in partition(graph, hoisted) for n in region.nodes}
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in products:
        readers.setdefault(g.operand(node, 0), []).append(node)
    for x, some in readers.items():
        root = root_of(x)
        region = home.get(root)
        whole = product(g.shape(x)) == product(g.shape(root))
        made_by_kernel = region is not None and whole and not _is_epilogue(region, kinds)
        if made_by_kernel or len(some) > 1 or not has_plain_rows(layout_with_copies(x)):
            _quantize_apart(x, some)


def _is_epilogue(region: Region, kinds: dict[fx.Node, str]) -> bool:
    """Tell whether a GEMM's launch will compute a region."""
    return len(region.outputs) == 1 and any(
        is_packable(n, kinds) and match_epilogue(region, n, kinds) is not None
        for n in region.inputs
    )


def _quantize_apart(x: fx.Node, products: list[fx.Node]) -> None:
    first = min(products)
    with x.graph.inserting_before(first):
        scale = g.emit(first, row_scale, x)
        rows = g.emit(first, quantize_rows, x, scale)
    assert g.dtype(rows) is torch.int8
    for node in products:
        node.args = (rows, *node.args[1:4], scale, node.args[5])
