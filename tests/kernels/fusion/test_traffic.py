"""Traffic as expressions, against elements counted one by one."""

from __future__ import annotations

import itertools

import pytest
import sympy
import torch

from tests.compiled_functions import compile_function
from turbotx import ir
from turbotx.ir.expr import evaluate
from turbotx.kernels.fusion.traffic import kernel_traffic

F = torch.nn.functional
WEIGHT = torch.ones(8)

CASES = {
    "add": (lambda x, y: x + y, (3, 8), (3, 8)),
    "a vector for every row": (lambda x: F.layer_norm(x, (8,), WEIGHT), (3, 8)),
    "broadcast from both sides": (lambda x, y: x + y, (3, 1), (1, 8)),
    "one part of a row": (lambda x: x[:, :3] * 2, (4, 8)),
    "two parts of a row": (lambda x: F.silu(x[:, :4]) * x[:, 4:], (3, 8)),
    "transposed": (lambda x: x.t().contiguous() * 2, (3, 8)),
    "halves turned": (lambda x: x * 2 + torch.cat([-x[..., 4:], x[..., :4]], -1), (3, 8)),
    "summed": (lambda x: x.sum(0), (5, 8)),
}


def count(kernel: ir.Kernel, dims: dict[str, int]) -> int:
    """Bytes of every element that the kernel touches, found by walking its loops."""
    extents = [range(evaluate(a.extent, dims)) for a in kernel.axes]
    touched: dict[str, set[int]] = {p.name: set() for p in kernel.params}
    for place in itertools.product(*extents):
        here = {a.symbol: sympy.Integer(i) for a, i in zip(kernel.axes, place, strict=True)}
        for s in kernel.body:
            if isinstance(s, (ir.Load, ir.Store)) and s.access.mask is None:
                touched[s.access.param].add(evaluate(s.access.offset.xreplace(here), dims))
    return sum(len(touched[p.name]) * p.dtype.itemsize for p in kernel.params)


@pytest.mark.parametrize("name", CASES)
def test_every_element_counts_once(name: str) -> None:
    function, *shapes = CASES[name]
    inputs = [torch.ones(shape) for shape in shapes]
    (kernel,) = compile_function(function, *inputs).kernels
    dims = {n: 5 if n == "batch" else 7 for n in kernel.sizes}
    read, written, compulsory = kernel_traffic(kernel).at(dims)
    assert read + written == compulsory == count(kernel, dims)


def test_a_gather_reads_a_row_for_each_index_or_the_whole_table() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    table = torch.ones(10, 8)
    (kernel,) = compile_function(lambda ids: F.embedding(ids, table) * 2, ids).kernels
    few, many = ({"batch": b, "seq": 3} for b in (2, 9))
    assert kernel_traffic(kernel).at(few)[0] == 6 * 8 + 6 * 32
    assert kernel_traffic(kernel).at(many)[0] == 27 * 8 + 10 * 32
