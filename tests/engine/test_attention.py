"""`attention=`: both ways of computing attention, end to end, against float64.

In: functions around scaled_dot_product_attention and hand-written softmaxes, with every mask. Out:
differences bounded by eager's own; which launches ran; errors for what cannot be done.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import turbotx
from tests.models import assert_as_exact_as_eager, in_double, small_model, token_inputs
from turbotx.engine.optimize import engine_of
from turbotx.errors import OptionsError

WAYS = ("flash", "fused-softmax")


def split(x, width, heads=4):
    """Show (batch, length, heads * width) as (batch, heads, length, width)."""
    return x.view(*x.shape[:2], heads, width).transpose(1, 2)


def every_mask(q, k, v, keys, lengths, bias, table):
    """All masks at once, so that one build serves them: plain, causal, key mask, lengths, ..."""
    q, k, v = (split(x, 20) for x in (q, k, v))
    sdpa = F.scaled_dot_product_attention
    rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    shown = keys[:, None, None, :]

    def scores(scale):
        return (q * scale) @ k.transpose(2, 3)

    return [
        sdpa(q, k, v),
        sdpa(q, k, v, is_causal=True, scale=0.3),
        sdpa(q, k, v, shown),
        sdpa(q, k, v, (columns < lengths[:, None])[:, None, None, :]),
        sdpa(q, k, v, bias),
        sdpa(q, k, v, table),
        sdpa(q, k, v, shown & (columns <= rows) & (rows - columns < 3)),
        sdpa(q, k, v, (rows - columns).abs() <= 2),
        scores(0.3).masked_fill(~shown, -math.inf).softmax(-1) @ v,
        (scores(0.4) + table).softmax(-1) @ v,
    ]


def operands(batch: int, length: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k and v of 4 heads; the second sequence sees no key, the third half of them."""
    qkv = torch.randn(3, batch, length, 4 * width).to(dtype)
    count = torch.tensor([length, 0, (length + 1) // 2])[:batch]
    keys = torch.arange(length) < count[:, None]
    bias = torch.rand(batch, 1, length, length) < 0.7
    bias[:, :, length // 2] = False
    return [*qkv, keys, count, bias, torch.randn(1, 4, length, length).to(dtype)]


def kinds_of(optimized) -> list[str]:
    return [x.kind for c in engine_of(optimized).variants() for x in c.assembly.launches]


def names_of(optimized) -> list[str]:
    launches = [x for c in engine_of(optimized).variants() for x in c.assembly.launches]
    return [x.name.rpartition("_")[0] for x in launches]


@pytest.mark.parametrize(
    "way, dtype",
    [
        ("flash", torch.float32),
        ("flash", torch.float16),
        ("fused-softmax", torch.float32),
        ("fused-softmax", torch.bfloat16),
    ],
)
def test_every_mask(way: str, dtype: torch.dtype) -> None:
    fast = turbotx.optimize(every_mask, attention=way)
    for batch, length in ((3, 7), (1, 1), (2, 33)):
        given = operands(batch, length, 20, dtype)
        exact = every_mask(*(t.double() if t.is_floating_point() else t for t in given))
        ours, eager = fast(*given), every_mask(*given)
        for mine, own, true in zip(ours, eager, exact, strict=True):
            assert torch.equal(mine.isnan(), true.isnan())
            assert_as_exact_as_eager(mine.nan_to_num(), own.nan_to_num(), true.nan_to_num())
    first, *other = engine_of(fast).variants()
    assert len(other) <= 1, "sizes of 1 broadcast: they may have a capture of their own"
    names = [x.name.rpartition("_")[0] for x in first.assembly.launches]
    assert names.count("attention") == (10 if way == "flash" else 0)
    assert names.count("attention_values") == (0 if way == "flash" else 10)
    assert "aten" not in [x.kind for x in first.assembly.launches]


@pytest.mark.parametrize("way", WAYS)
def test_head_dims(way: str) -> None:
    widths = (16, 80, 256)

    def heads(*given):
        triples = [(w, given[3 * n : 3 * n + 3]) for n, w in enumerate(widths)]
        made = [[split(x, w) for x in t] for w, t in triples]
        return [F.scaled_dot_product_attention(*t, is_causal=True) for t in made]

    fast = turbotx.optimize(heads, attention=way)
    for length in (5, 1):
        given = [t for w in widths for t in operands(2, length, w, torch.float32)[:3]]
        exact = heads(*(t.double() for t in given))
        assert_as_exact_as_eager(fast(*given), heads(*given), exact)
    assert names_of(fast).count("attention") == (3 if way == "flash" else 0)


def test_auto_takes_flash_where_its_kernel_can() -> None:
    def both(q, k, v, wide):
        q, k, v, wide = split(q, 16), split(k, 16), split(v, 16), split(wide, 24)
        plain = F.scaled_dot_product_attention(q, k, v)
        return plain, F.scaled_dot_product_attention(q, k, wide)

    q, k, v = operands(2, 5, 16, torch.float32)[:3]
    wide = torch.randn(2, 5, 96)
    fast = turbotx.optimize(both)
    exact = both(q.double(), k.double(), v.double(), wide.double())
    assert_as_exact_as_eager(fast(q, k, v, wide), both(q, k, v, wide), exact)
    kinds = kinds_of(fast)
    assert (kinds.count("attention"), kinds.count("product")) == (1, 2)
    with pytest.raises(OptionsError, match=r"v's head_dim 24 is not q's 16.*'auto'"):
        turbotx.optimize(both, attention="flash")(q, k, v, wide)


def test_grouped_heads_and_rows_that_are_not_side_by_side() -> None:
    def function(q, k, v):
        k, v = (t.view(t.shape[0], 2, 16, t.shape[2]).transpose(2, 3) for t in (k, v))
        return F.scaled_dot_product_attention(split(q, 16), k, v, enable_gqa=True)

    given = torch.randn(2, 6, 64), torch.randn(2, 32, 6), torch.randn(2, 32, 6)
    for way in WAYS:
        fast = turbotx.optimize(function, attention=way)
        exact = function(*(t.double() for t in given))
        assert_as_exact_as_eager(fast(*given), function(*given), exact)
        assert "attention" in kinds_of(fast) or "product" in kinds_of(fast)
        (compiled,) = engine_of(fast).variants()
        assert any("side by side" in reason for _, reason in compiled.assembly.externs)


def test_double_precision_is_refused_by_name_and_left_to_pytorch_by_auto() -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 16, dtype=torch.float64)
    auto = turbotx.optimize(F.scaled_dot_product_attention)
    torch.testing.assert_close(auto(q, k, v), F.scaled_dot_product_attention(q, k, v))
    for way in WAYS:
        with pytest.raises(OptionsError, match=r"float32, bfloat16 or float16.*are float64"):
            turbotx.optimize(F.scaled_dot_product_attention, attention=way)(q, k, v)


def test_an_unknown_way_is_refused_at_once() -> None:
    with pytest.raises(OptionsError, match="attention='fused' is not one of 'auto', 'flash'"):
        turbotx.optimize(every_mask, attention="fused")


def test_without_kernels_pytorch_computes_both_ways() -> None:
    given = operands(3, 7, 20, torch.float32)
    exact = every_mask(*(t.double() if t.is_floating_point() else t for t in given))
    for way in WAYS:
        ours = turbotx.optimize(every_mask, attention=way, backend="aten")(*given)
        for mine, true in zip(ours, exact, strict=True):
            torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_model_is_three_launches_an_attention_the_papers_way() -> None:
    model, inputs = small_model("bert", layers=1), token_inputs(3, 9)
    fast = turbotx.optimize(model, attention="fused-softmax")
    assert_as_exact_as_eager(fast(**inputs), model(**inputs), in_double(model)(**inputs))
    (compiled,) = engine_of(fast).variants()
    names = [x.name for x in compiled.assembly.launches]
    first = names.index("attention_scores_0")
    assert names[first + 1].startswith("fused_") and "softmax" in names[first + 1]
    assert names[first + 2] == "attention_values_0"
    report = turbotx.explain(fast, **inputs)
    assert {k.kind for k in report.kernels} == {"kernel", "product"}
