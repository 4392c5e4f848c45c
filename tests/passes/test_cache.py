"""Cache: appends that attention alone reads stay in the cache's memory; others give a copy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import turbotx
from turbotx.capture.trace import capture
from turbotx.engine.pipeline import rewrite
from turbotx.ir.cache_ops import cache_store
from turbotx.passes.cache import store_in_place

append = torch.ops.turbotx.cache_append


class Step(nn.Module):
    """One layer of two heads of eight; leak: what else is done with the keys."""

    def __init__(self, leak=None) -> None:
        super().__init__()
        self.leak, self.qkv = leak, nn.Linear(16, 48)

    def forward(self, x, memory, length):
        q, k, v = (y.view(*x.shape[:2], 2, 8).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        k = append(memory, k, length, 0, 0, 0)
        v = append(memory, v, length, 16, 0, 1)
        out = F.scaled_dot_product_attention(q, k, v)
        return out if self.leak is None else (out, self.leak(k))


def call(batch=2, count=3, length=7, capacity=11):
    return torch.randn(batch, count, 16), torch.randn(32, batch, capacity), torch.empty(length, 0)


def rewritten(module):
    graph = capture(module.eval(), call(), {}).graph_module.graph
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


@torch.no_grad()
def test_programs_write_the_rows_and_nothing_else() -> None:
    for module in (Step().eval(), Step(lambda k: k[:, :, 1:]).eval()):
        for backend in ("auto", "aten"):
            fast = turbotx.optimize(module, backend=backend)
            for sizes in ((2, 3, 7, 11), (1, 1, 1, 4), (3, 5, 20, 20)):
                x, ours, length = call(*sizes)
                theirs = ours.clone()
                torch.testing.assert_close(fast(x, ours, length), module(x, theirs, length))
                torch.testing.assert_close(ours, theirs)
