"""Cache: appends that attention alone reads stay in the cache's memory; others give a copy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import turbotx
from turbotx.capture.trace import capture
from turbotx.engine.pipeline import rewrite
from turbotx.errors import IndexOutOfRangeError
from turbotx.ir.cache_ops import cache_store
from turbotx.passes.cache import store_in_place

append = torch.ops.turbotx.cache_append


class Step(nn.Module):
    """One layer of two heads of eight; leak: what else is done with the keys."""

    def __init__(self, leak=None) -> None:
        super().__init__()
        self.leak, self.qkv = leak, nn.Linear(16, 48)

    def forward(self, x, memory, table, length):
        q, k, v = (y.view(*x.shape[:2], 2, 8).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        k = append(memory, table, k, length, 0, 0, 0)
        v = append(memory, table, v, length, 16, 0, 1)
        out = F.scaled_dot_product_attention(q, k, v)
        return out if self.leak is None else (out, self.leak(k))


def call(batch=2, count=3, length=7, capacity=11, columns=1):
    """Return x, memory, its table and an empty length; columns: of blocks in any order."""
    memory = torch.randn(32 * columns, batch, capacity)
    blocks, generator = 2 * batch * columns, torch.Generator().manual_seed(length)
    order = torch.randperm(blocks, generator=generator) if columns > 1 else torch.arange(blocks)
    table = (order * 16 * capacity).view(2, batch, columns)
    return torch.randn(batch, count, 16), memory, table, torch.empty(length, 0)


def rewritten(module):
    graph = capture(module.eval(), call(columns=5), {}).graph_module.graph
    rewrite(graph)
    before = str(graph)
    store_in_place(graph)
    assert str(graph) == before  # twice changes nothing
    return [n.target for n in graph.nodes if n.target in (cache_store, append.default)]


def test_rows_stay_where_attention_reads_them() -> None:
    assert rewritten(Step()) == [cache_store, cache_store]


def test_rows_that_are_returned_or_computed_with_are_copied() -> None:
    for leak in (lambda k: k, lambda k: k * 2, lambda k: k[:, :, -1]):
        assert rewritten(Step(leak)) == [append.default, cache_store]


def assert_runs(fast, module, x, ours, table, length) -> None:
    theirs = ours.clone()
    torch.testing.assert_close(fast(x, ours, table, length), module(x, theirs, table, length))
    torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_programs_write_the_rows_and_nothing_else() -> None:
    for module in (Step().eval(), Step(lambda k: k[:, :, 1:]).eval()):
        for backend in ("auto", "aten"):
            fast = turbotx.optimize(module, backend=backend)
            for sizes in ((2, 3, 7, 11), (1, 1, 1, 4), (3, 5, 20, 20)):
                assert_runs(fast, module, *call(*sizes))


BLOCKS = [(2, 3, 7, 16, 2), (3, 1, 33, 16, 3), (1, 40, 90, 32, 4), (2, 1, 600, 64, 10),
          (2, 600, 600, 64, 10)]  # fmt: skip


@torch.no_grad()
def test_programs_read_and_write_blocks_by_their_table() -> None:
    for module in (Step().eval(), Step(lambda k: k[:, :, 1:]).eval()):
        fast = turbotx.optimize(module)
        for sizes in BLOCKS:
            assert_runs(fast, module, *call(*sizes))


@torch.no_grad()
@pytest.mark.parametrize("threads", [4, 8])
def test_keys_are_shared_out_to_threads_by_whole_blocks(threads) -> None:
    before, fast = torch.get_num_threads(), turbotx.optimize(module := Step().eval())
    torch.set_num_threads(threads)
    try:
        for sizes in ((1, 1, 9601, 64, 151), (3, 2, 4000, 64, 70), (1, 3, 7000, 7003)):
            assert_runs(fast, module, *call(*sizes))
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_a_table_is_refused_where_pytorch_reads_memory_by_strides() -> None:
    fast = turbotx.optimize(Step().eval(), backend="aten")
    with pytest.raises(IndexOutOfRangeError, match="a table of one column"):
        fast(*call(*BLOCKS[1]))


@torch.no_grad()
def test_more_rows_than_a_cache_has_room_for_are_refused() -> None:
    fast = turbotx.optimize(Step().eval())
    with pytest.raises(IndexOutOfRangeError, match="positions in a cache's memory"):
        fast(*call(2, 3, 40, 16, 2))
