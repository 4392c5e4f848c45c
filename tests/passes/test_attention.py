"""Attention: recognised from both its forms, its mask taken apart; refused where it must be."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import turbotx
from tests.kernels.cpp.cpp_probe import needs_compiler
from turbotx.capture.trace import capture
from turbotx.ir.attention_ops import attention
from turbotx.ir.fx_nodes import shape
from turbotx.passes.attention import recognize_attention
from turbotx.passes.canonicalize import canonicalize
from turbotx.passes.partition import op_name

X = torch.randn(2, 5, 16)
KEYS = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


class Attend(nn.Module):
    """Projections as models have them, four heads of eight, around the attention under test."""

    def __init__(self, inner, kv_heads=4) -> None:
        super().__init__()
        self.inner, self.kv_heads = inner, kv_heads
        self.q = nn.Linear(16, 32)
        self.k, self.v = nn.Linear(16, 8 * kv_heads), nn.Linear(16, 8 * kv_heads)

    def forward(self, x, *rest):
        def heads(y, count):
            return y.view(*x.shape[:2], count, 8).transpose(1, 2)

        q = heads(self.q(x), 4)
        return self.inner(q, *(heads(p(x), self.kv_heads) for p in (self.k, self.v)), *rest)


def recognized(inner, *rest, kv_heads=4, x=X):
    module = Attend(inner, kv_heads).to(x.dtype).eval()
    found = capture(module, (x, *rest), {})
    graph = found.graph_module.graph
    canonicalize(graph)
    recognize_attention(graph)
    canonicalize(graph)
    graph.lint()
    found.graph_module.recompile()
    (ours,) = found.graph_module(x, *rest)
    torch.testing.assert_close(ours, module(x, *rest), rtol=2e-5, atol=2e-6)
    return [n for n in graph.nodes if n.target is attention]


def positions(length):
    return torch.arange(length)


def test_places_hidden_by_the_most_negative_number_are_causal_where_a_query_sees_itself() -> None:
    def inner(q, k, v):
        place = positions(q.shape[2])
        least = torch.finfo(q.dtype).min
        seen = (place[None, :] <= place[:, None])[None, None]
        mask = torch.where(seen, torch.zeros((), dtype=q.dtype), least)
        return F.scaled_dot_product_attention(q, k, v, mask)

    (node,) = recognized(inner)
    assert node.kwargs["causal"] and node.args[3] is None and node.args[4] is None


def test_a_bias_stays_without_a_batch_where_the_mask_only_hides_keys() -> None:
    """As T5 adds its position bias; a row without keys gets the mean of the values."""
    table, keys = torch.randn(4, 5, 5), torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])

    def inner(q, k, v, keys, table):
        least = torch.finfo(q.dtype).min
        mask = torch.where(keys[:, None, None, :] > 0, table[None], least)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=1.0)

    (node,) = recognized(inner, keys, table)
    assert node.kwargs["blind_mean"]
    assert shape(node.args[3])[1:3] == (1, 1) and shape(node.args[4])[0] == 1


def repeat_heads(x: torch.Tensor, times: int) -> torch.Tensor:
    batch, heads, length, width = x.shape
    wide = x[:, :, None].expand(batch, heads, times, length, width)
    return wide.reshape(batch, heads * times, length, width)


def test_repeated_key_heads_are_read_in_place() -> None:
    def inner(q, k, v):
        return F.scaled_dot_product_attention(q, repeat_heads(k, 2), repeat_heads(v, 2))

    (node,) = recognized(inner, kv_heads=2)
    assert [int(shape(n)[1]) for n in node.args[:3]] == [4, 2, 2]


def test_a_scale_of_the_query_alone_is_the_kernels() -> None:
    def scaled(q, k, v):
        return F.scaled_dot_product_attention(q * 0.25, k, v, scale=2.0)

    (node,) = recognized(scaled)
    assert node.kwargs["scale"] == 0.5
    assert not [n for n in node.graph.nodes if "mul" in str(n.target) and n.users]


def test_a_scale_that_others_read_stays() -> None:
    def shared(q, k, v):
        y = q * 0.25
        return F.scaled_dot_product_attention(y, y, v, scale=2.0)

    (node,) = recognized(shared)
    assert node.kwargs["scale"] == 2.0


def test_plain_sdpa() -> None:
    (node,) = recognized(lambda q, k, v: F.scaled_dot_product_attention(q, k, v))
    assert node.args[3:] == (None, None)
    assert node.kwargs == {"scale": 1 / math.sqrt(8), "causal": False}


def test_causal_flag() -> None:
    (node,) = recognized(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert node.kwargs["causal"] is True


def test_key_mask_is_not_materialized() -> None:
    def function(q, k, v, keys):
        mask = keys.bool()[:, None, None, :].expand(q.shape[0], 1, q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, mask)

    (node,) = recognized(function, KEYS)
    assert node.args[4] is None
    assert shape(node.args[3])[1:3] == (1, 1)


def test_causal_and_key_mask_are_told_apart() -> None:
    def function(q, k, v, keys):
        rows, columns = positions(q.shape[2]), positions(k.shape[2])
        mask = (columns[None, :] <= rows[:, None])[None, None] & keys.bool()[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, mask)

    (node,) = recognized(function, KEYS)
    assert node.kwargs["causal"] is True
    assert node.args[4] is None


WINDOWS = {
    "no further than 2": (lambda q, k: (q - k).abs() <= 2, False, (2, 2)),
    "nearer than 3": (lambda q, k: abs(k - q) < 3, False, (2, 2)),
    "the last 3": (lambda q, k: (k <= q) & (k > q - 3), True, (2, -1)),
    "from 1 before": (lambda q, k: q - 1 <= k, False, (1, -1)),
    "to 2 after": (lambda q, k: k < q + 3, False, (-1, 2)),
    "the narrower of two": (lambda q, k: (q - k <= 3) & (q - k <= 1) & (k <= q), True, (1, -1)),
}


@pytest.mark.parametrize("said", WINDOWS)
def test_a_window_is_not_materialized(said: str) -> None:
    compare, causal, window = WINDOWS[said]

    def function(q, k, v):
        rows, columns = positions(q.shape[2])[:, None], positions(q.shape[2])[None, :]
        return F.scaled_dot_product_attention(q, k, v, compare(rows, columns))

    (node,) = recognized(function)
    assert node.kwargs["causal"] is causal
    assert node.kwargs["window"] == window
    assert node.args[3:] == (None, None)


@pytest.mark.parametrize(
    "compare",
    [lambda q, k: k < q, lambda q, k: 2 * q >= k, lambda q, k: (q - k).abs() >= 2],
    ids=["strictly before", "twice as far", "away"],
)
def test_other_comparisons_of_places_are_kept_as_a_mask(compare) -> None:
    def function(q, k, v):
        rows, columns = positions(q.shape[2])[:, None], positions(q.shape[2])[None, :]
        return F.scaled_dot_product_attention(q, k, v, compare(rows, columns))

    (node,) = recognized(function)
    assert "window" not in node.kwargs and node.kwargs["causal"] is False
    assert node.args[4] is not None


def test_lengths_are_not_made_a_mask() -> None:
    def function(q, k, v, lengths):
        mask = positions(k.shape[2])[None, :] < lengths[:, None]
        return F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :])

    (node,) = recognized(function, torch.tensor([3, 5]))
    assert shape(node.args[3]) == shape(node.args[0])[:1]
    assert node.args[4] is None


def test_a_mask_of_one_key_for_all_is_a_bias() -> None:
    def function(q, k, v, keys):
        return F.scaled_dot_product_attention(q, k, v, keys.bool()[:, :1, None, None])

    (node,) = recognized(function, torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 1, 1]]))
    assert node.args[3] is None
    assert node.args[4] is not None


def test_the_papers_way_is_two_products_and_ordinary_ops() -> None:
    module = Attend(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    found = capture(module.eval(), (X,), {})
    graph = found.graph_module.graph
    canonicalize(graph)
    recognize_attention(graph, "fused-softmax")
    names = [op_name(n) for n in graph.nodes if n.op == "call_function"]
    first = names.index("attention_scores")
    between = names[first + 1 : names.index("attention_values")]
    assert between == ["mul", "full_like", "tril", "logical_not", "masked_fill", "safe_softmax"]
    found.graph_module.recompile()
    (ours,) = found.graph_module(X)
    torch.testing.assert_close(ours, module(X), rtol=2e-5, atol=2e-6)


def test_an_upper_triangle_is_not_causal() -> None:
    def function(q, k, v):
        rows, columns = positions(q.shape[2]), positions(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, columns[None, :] >= rows[:, None])

    (node,) = recognized(function)
    assert node.kwargs["causal"] is False
    assert node.kwargs["window"] == (0, -1)


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_the_chain_of_matmuls(divide: bool, masked: bool) -> None:
    def function(q, k, v, keys):
        scores = q @ k.transpose(-1, -2)
        scores = scores / math.sqrt(8) if divide else scores * 0.25
        if masked:
            scores = scores + (1.0 - keys.float())[:, None, None, :] * -10000.0
        return scores.softmax(-1) @ v

    (node,) = recognized(function, KEYS)
    assert node.kwargs["scale"] == pytest.approx(1 / math.sqrt(8) if divide else 0.25)
    assert (node.args[4] is not None) == masked


def test_grouped_queries() -> None:
    (node,) = recognized(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), kv_heads=2
    )
    assert shape(node.args[1])[1] == 2


def test_weights_that_are_returned_are_not_fused() -> None:
    def function(q, k, v):
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return weights @ v

    def both(q, k, v):
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return weights @ v + weights.sum()

    assert len(recognized(function)) == 1
    assert recognized(both) == []


def test_softmax_over_queries_is_not_attention() -> None:
    assert recognized(lambda q, k, v: (q @ k.transpose(-1, -2)).softmax(-2) @ v) == []


def test_double_precision_stays_with_pytorch() -> None:
    plain = F.scaled_dot_product_attention
    assert recognized(lambda q, k, v: plain(q, k, v), x=X.double()) == []


INF = float("inf")
HIDDEN = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)


def scores_of(q, k):
    return q @ k.transpose(-1, -2) * 0.3


def additive(keys, low):
    return torch.zeros(keys.shape).masked_fill(~keys, low)[:, None, None, :]


# A row whose keys are all hidden: NaN from a softmax of -inf, zeros from SDPA, a plain average
# from a large negative number.
FORMS = {
    "filled": lambda q, k, v, keys: (
        scores_of(q, k).masked_fill(~keys[:, None, None, :], -INF).softmax(-1) @ v
    ),
    "filled, causal": lambda q, k, v, keys: (
        scores_of(q, k)
        .masked_fill(
            ~(keys[:, None, None, :] & (positions(5)[None] <= positions(5)[:, None])), -INF
        )
        .softmax(-1)
        @ v
    ),
    "filled with a large number": lambda q, k, v, keys: (
        scores_of(q, k).masked_fill(~keys[:, None, None, :], -1e9).softmax(-1) @ v
    ),
    "chosen": lambda q, k, v, keys: (
        torch.where(keys[:, None, None, :], scores_of(q, k), -INF).softmax(-1) @ v
    ),
    "added": lambda q, k, v, keys: (scores_of(q, k) + additive(keys, -INF)).softmax(-1) @ v,
    "added, a large number": lambda q, k, v, keys: (
        (scores_of(q, k) + additive(keys, torch.finfo(torch.float32).min)).softmax(-1) @ v
    ),
    "sdpa, boolean": lambda q, k, v, keys: F.scaled_dot_product_attention(
        q, k, v, keys[:, None, None, :]
    ),
    "sdpa, added": lambda q, k, v, keys: F.scaled_dot_product_attention(
        q, k, v, additive(keys, -INF).expand(q.shape[0], 1, 5, 5)
    ),
}


@pytest.fixture(scope="module")
def rows_that_see_nothing() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Every form's result, by eager and by one compiled program."""
    modules = nn.ModuleList(Attend(inner) for inner in FORMS.values()).eval()

    class Every(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.forms = modules

        def forward(self, x, keys):
            return [form(x, keys) for form in self.forms]

    every = Every().eval()
    with torch.no_grad():
        return every(X, HIDDEN), turbotx.optimize(every)(X, HIDDEN)


@needs_compiler
@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_sees_nothing_is_what_eager_gives(form: str, rows_that_see_nothing) -> None:
    eager, ours = (results[list(FORMS).index(form)] for results in rows_that_see_nothing)
    hidden = eager[1]
    assert hidden.isnan().all() if form in ("filled", "filled, causal", "chosen", "added") else True
    torch.testing.assert_close(ours, eager, rtol=2e-5, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("form", ["filled", "added", "sdpa, boolean"])
def test_what_a_blind_row_gives_is_said_by_the_node(form: str) -> None:
    (node,) = recognized(FORMS[form], torch.ones(2, 5, dtype=torch.bool))
    assert node.kwargs.get("blind_nan", False) == (not form.startswith("sdpa"))


def test_heads_of_no_width() -> None:
    fast = turbotx.optimize(F.scaled_dot_product_attention)
    for width in (0, 4):
        q = torch.randn(2, 3, 5, width)
        torch.testing.assert_close(fast(q, q, q), F.scaled_dot_product_attention(q, q, q))
