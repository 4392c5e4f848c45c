"""Triton attention against float64: every mask, odd head dims and lengths, strided operands.

In: small operands on the CPU, in Triton's interpreter. Out: differences from the op's own meaning
in float64, bounded by PyTorch's own in the operands' dtype.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.kernels.triton.attention_runner import check, multiply, operands, run
from turbotx.ir.attention_ops import attention_scores, attention_values
from turbotx.ir.matmul_kernels import AttentionKernel, ProductKernel


@pytest.fixture(autouse=True, params=[False, True], ids=["tiles", "once"])
def _form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.kernels.triton.attention_runner.ONCE", request.param)


def kernel(width, dtype=torch.float32, causal=False, bias="none", scale=None, **rest):
    return AttentionKernel(dtype, width, scale or 1 / math.sqrt(width), causal, bias, **rest)


@pytest.mark.parametrize(("width", "length"), [(16, 1), (20, 33), (64, 15), (256, 3)])
def test_reads_packed_operands_in_place(width: int, length: int) -> None:
    q, k, v = operands(2, 2, 2, length, length, width)
    case = kernel(width)
    check(run(case, q, k, v), q, k, v, scale=case.scale)


@pytest.mark.parametrize(("q_len", "k_len"), [(3, 20), (20, 3), (17, 17)])
def test_causal(q_len: int, k_len: int) -> None:
    q, k, v = operands(1, 2, 2, q_len, k_len, 16)
    case = kernel(16, causal=True)
    check(run(case, q, k, v), q, k, v, scale=case.scale, causal=True)


@pytest.mark.parametrize("deep", [1, 2, 5])
def test_more_sequences_than_a_grid_is_deep(deep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbotx.kernels.triton.attention.MOST_DEEP", deep)
    q, k, v = operands(5, 2, 1, 20, 20, 16)
    visible = torch.arange(20)[None, :] < torch.tensor([20, 1, 7, 0, 19])[:, None]
    case = kernel(16)
    check(run(case, q, k, v, visible), q, k, v, visible, scale=case.scale)


def test_grouped_heads_share_keys() -> None:
    q, k, v = operands(2, 6, 2, 5, 5, 16)
    case = kernel(16, scale=0.3)
    check(run(case, q, k, v), q, k, v, scale=0.3)


def test_key_mask_and_a_sequence_that_sees_nothing() -> None:
    q, k, v = operands(3, 2, 2, 9, 18, 16)
    visible = torch.arange(18)[None, :] < torch.tensor([[18], [1], [0]])
    case = kernel(16)
    out = run(case, q, k, v, visible)
    check(out, q, k, v, visible, scale=case.scale)
    assert (out[2] == 0).all()


@pytest.mark.parametrize("window", [(-1, -1), (5, -1), (3, 2)])
def test_queries_at_the_last_keys(window: tuple[int, int]) -> None:
    q, k, v = operands(1, 2, 2, 5, 37, 16)
    case = kernel(16, causal=window[1] < 0, window=window, late=True)
    said = {"scale": case.scale, "window": window, "causal": case.causal, "late": True}
    check(run(case, q, k, v), q, k, v, **said)


@pytest.mark.parametrize("window", [(3, 2), (0, -1), (-1, 4), (20, 40)])
@pytest.mark.parametrize("causal", [False, True])
def test_a_window_around_each_query(window: tuple[int, int], causal: bool) -> None:
    q, k, v = operands(1, 2, 1, 35, 35, 16)
    case = kernel(16, causal=causal, window=window)
    check(run(case, q, k, v), q, k, v, scale=case.scale, window=window, causal=causal)


def test_lengths_count_the_keys_of_each_sequence() -> None:
    q, k, v = operands(4, 2, 2, 3, 20, 16)
    lengths = torch.tensor([20, 1, 0, 30])  # 30: more than there are
    case = kernel(16)
    out = run(case, q, k, v, lengths)
    check(out, q, k, v, lengths, scale=case.scale)
    assert (out[2] == 0).all()


@pytest.mark.parametrize("given", ["lengths", "bias"])
def test_a_query_that_sees_nothing_of_a_bias_or_lengths_is_nan(given: str) -> None:
    q, k, v = operands(2, 2, 2, 3, 18, 16)
    case = kernel(16, bias="float32" if given == "bias" else "none", blind_nan=True)
    keys = bias = None
    if given == "bias":
        bias = torch.zeros(2, 1, 3, 18)
        bias[1] = float("-inf")
    else:
        keys = torch.tensor([18, 0])
    out = run(case, q, k, v, keys, bias)
    check(out, q, k, v, keys, bias, scale=case.scale, blind_nan=True)
    assert out[1].isnan().all() and not out[0].isnan().any()


@pytest.mark.parametrize("shape", [(2, 2, 7, 19), (1, 2, 1, 19), (2, 1, 7, 1), (1, 1, 7, 19)])
@pytest.mark.parametrize("kind", ["float32", "boolean"])
def test_bias_of_any_broadcast_shape(shape: tuple[int, ...], kind: str) -> None:
    q, k, v = operands(2, 2, 2, 7, 19, 16)
    bias = torch.randn(shape) if kind == "float32" else torch.rand(shape) < 0.7
    case = kernel(16, bias=kind)
    check(run(case, q, k, v, bias=bias), q, k, v, bias=bias, scale=case.scale)


def test_bias_may_hide_keys_by_minus_infinity() -> None:
    q, k, v = operands(1, 1, 1, 4, 20, 16)
    bias = torch.zeros(1, 1, 4, 20)
    bias[..., :17] = float("-inf")  # the whole first tile
    bias[:, :, 2] = float("-inf")  # one query sees nothing
    case = kernel(16, bias="float32")
    out = run(case, q, k, v, bias=bias)
    check(out, q, k, v, bias=bias, scale=case.scale)
    assert (out[:, 2] == 0).all()


def test_a_query_that_sees_nothing_is_nan_where_softmax_gives_that() -> None:
    q, k, v = operands(2, 2, 1, 3, 18, 16)
    visible = torch.arange(18)[None, :] < torch.tensor([[5], [0]])
    case = replace(kernel(16), blind_nan=True)
    out = run(case, q, k, v, visible)
    assert out[1].isnan().all()
    check(out[:1], q[:1], k[:1], v[:1], visible[:1], scale=case.scale)
    nothing = run(case, q, k[:, :, :0], v[:, :, :0], visible[:, :0])
    assert (nothing == 0).all()  # no keys at all: a sum of nothing


@pytest.mark.parametrize("bias", ["none", "float32", "boolean"])
def test_hidden_keys_of_a_blind_row_weigh_the_same(bias: str) -> None:
    """As where hidden scores are the most negative float: T5's padding, beside its bias, and
    GPT-Neo's, beside its buffer."""
    q, k, v = operands(3, 2, 2, 5, 19, 16)
    visible = torch.arange(19)[None, :] < torch.tensor([[19], [3], [0]])
    case = kernel(16, bias=bias, blind_mean=True)
    added = torch.randn(1, 2, 5, 19) if bias != "none" else None
    if bias == "boolean":
        added = (added > 0) & (torch.arange(5)[:, None] != 3)  # query 3 sees no key at all
    out = run(case, q, k, v, visible, added)
    check(out, q, k, v, visible, added, scale=case.scale, blind_mean=True)
    mean = v[2].mean(1).expand(5, 2, 16)
    torch.testing.assert_close(out[2], mean)


def test_a_blind_query_averages_keys_that_come_after_it_too() -> None:
    q, k, v = operands(2, 2, 1, 21, 21, 16)
    visible = torch.arange(21)[None, :] >= torch.tensor([[0], [18]])
    case = kernel(16, causal=True, blind_mean=True)
    out = run(case, q, k, v, visible)
    check(out, q, k, v, visible, scale=case.scale, causal=True, blind_mean=True)
    torch.testing.assert_close(out[1, 3], v[1].mean(1).expand(2, 16))


@pytest.mark.parametrize("kind", ["blind_mean", "blind_nan"])
def test_sinks_take_shares_that_go_to_no_value(kind: str) -> None:
    """Queries that see no key get zeros, but where the sink is minus infinity: causal with keys of
    the first places hidden, as left padding does."""
    q, k, v = operands(3, 4, 2, 19, 19, 16)
    visible = torch.arange(19)[None, :] >= torch.tensor([[0], [3], [19]])
    sinks = torch.tensor([0.5, -1.0, -math.inf, 30.0])
    case = kernel(16, causal=True, sinks=True, **{kind: True})
    out = run(case, q, k, v, visible, sinks=sinks)
    said = {"scale": case.scale, "causal": True, kind: True}
    check(out, q, k, v, visible, None, sinks, **said)
    assert (out[2, :, 0] == 0).all()
    nothing = run(case, q, k[:, :, :0], v[:, :, :0], visible[:, :0], sinks=sinks)
    assert (nothing == 0).all()


def test_scores_are_capped_before_the_bias() -> None:
    q, k, v = operands(2, 2, 1, 7, 19, 16)
    case = kernel(16, bias="float32", softcap=0.5, causal=True)
    bias = torch.randn(2, 1, 7, 19)
    said = {"scale": case.scale, "softcap": 0.5, "causal": True}
    check(run(case, q, k, v, bias=bias), q, k, v, bias=bias, **said)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = operands(1, 1, 1, 4, 20, 16)
    case = kernel(16, scale=1000.0)
    check(run(case, q, k, v), q, k, v, scale=1000.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_accumulate_in_float32(dtype: torch.dtype) -> None:
    q, k, v = operands(1, 2, 2, 8, 40, 16, dtype)
    case = kernel(16, dtype, bias="storage")
    bias = torch.randn(1, 2, 8, 40, dtype=dtype)
    check(run(case, q, k, v, bias=bias), q, k, v, bias=bias, scale=case.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "q_len", "k_len", "width"), [(2, 1, 1, 16), (4, 17, 17, 20), (2, 3, 33, 40)]
)
def test_products_around_a_softmax(
    dtype: torch.dtype, heads: int, q_len: int, k_len: int, width: int
) -> None:
    q, k, v = operands(2, heads, 2, q_len, k_len, width, dtype)
    scores = multiply(ProductKernel("scores", dtype, width), q, k)
    exact = attention_scores(q.double(), k.double())
    assert (scores - exact).abs().max() <= 1e-5 * exact.abs().max()
    shares = exact.softmax(-1).to(dtype)
    values = multiply(ProductKernel("values", dtype, width), shares, v)
    exact = attention_values(shares.double(), v.double())
    assert values.shape == exact.shape and values.dtype is dtype
    assert (values - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()
