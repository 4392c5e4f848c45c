"""Models of int4 weights: what comes out, for any shape, beside the reference of equal numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import turbotx
from benchmarks.int8_fidelity import sentences
from tests.engine.test_quantized import launches, made
from tests.kernels.cpp.cpp_probe import needs_compiler
from turbotx.errors import WeightsReleasedError

pytestmark = needs_compiler
HOW: Any = "int4-weights"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_it_is_the_reference_and_near_the_float_model(
    dtype: torch.dtype, norm: type[nn.Module]
) -> None:
    """Widths of 24 and 40, which no group divides."""
    model = made(dtype, norm=norm)
    fast, reference = (turbotx.optimize(model, quantize=HOW, backend=b) for b in ("cpp", "aten"))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
    for shape in ((1, 1, 24), (3, 5, 24), (0, 4, 24), (2, 20, 24)):
        x = torch.randn(shape).to(dtype)
        with torch.no_grad():
            ours, own, plain = fast(x), reference(x), model(x)
        for a, b, c in zip(ours, own, plain, strict=True):
            assert a.dtype == b.dtype == dtype
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
            assert (F.cosine_similarity(a.float(), c.float(), -1) > 0.98).all()


@pytest.mark.parametrize("batch", [1, 4])
def test_every_launch_keeps_the_rule_and_likeness_is_told_apart(batch: int) -> None:
    model, x = made(), torch.randn(batch, 9, 24)
    fast = turbotx.optimize(model, quantize=HOW)
    report = turbotx.explain(fast, x)
    numerics = report.numerics(fast, x)
    assert numerics.holds and not numerics.outputs
    assert [e.rows for e in numerics.likenesses] == [9 * batch, 9 * batch]
    assert 0.98 < numerics.likenesses[0].worst <= numerics.likenesses[0].mean < 1
    for errors in report.stress(x).values():
        assert all(e.holds for e in errors)
    assert str(report) and report.to_html()


def test_launches_are_as_many_and_the_head_stays_float() -> None:
    x = torch.randn(2, 4, 24)
    narrow = launches(turbotx.optimize(made(), quantize=HOW), x)
    assert len(narrow) == len(launches(turbotx.optimize(made()), x))
    assert sum(name.startswith("linear_int4_weights") for name in narrow) == 4
    assert "linear_0" in narrow
    named = launches(turbotx.optimize(made(), quantize=HOW, keep_float=("up", "head")), x)
    assert sum(name.startswith("linear_int4_weights") for name in named) == 3


def test_new_weights_are_seen() -> None:
    model = made()
    fast = turbotx.optimize(model, quantize=HOW)
    x = torch.randn(3, 6, 24)
    with torch.no_grad():
        before = fast(x)[0]
        model.up.weight.mul_(-1.5)
        other = turbotx.optimize(made(), quantize=HOW)
        other.up.weight.mul_(-1.5)
        assert torch.equal(fast(x)[0], other(x)[0]) and not torch.equal(fast(x)[0], before)


def test_a_row_with_nan_is_nan_and_no_other() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    fast = turbotx.optimize(model, quantize=HOW, keep_float=())
    x = torch.randn(4, 8)
    x[0, 1] = torch.nan
    with torch.no_grad():
        assert fast(x).isnan().all(-1).tolist() == [True, False, False, False]


def test_floats_given_up_for_int4_are_not_quantised_otherwise() -> None:
    model, x = made(), torch.randn(2, 4, 24)
    turbotx.optimize(model, quantize=HOW, keep_weights=False)(x)
    with pytest.raises(WeightsReleasedError, match="quantised otherwise"):
        turbotx.optimize(model, quantize="int8")(x)


def test_minilm_keeps_its_embeddings(minilm_path: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel.from_pretrained(minilm_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path)
    given = dict(tokenizer(sentences()[:40], padding=True, return_tensors="pt"))
    shown = given["attention_mask"][..., None]
    with torch.no_grad():
        ours, plain = (
            F.normalize((m(**given)[0] * shown).sum(1) / shown.sum(1), dim=-1)
            for m in (turbotx.optimize(model, quantize=HOW), model)
        )
    cosines = (ours * plain).sum(-1)
    assert cosines.mean() >= 0.96 and cosines.min() > 0.9


def test_a_decoder_generates_by_int4_weights() -> None:
    """Its steps, of one row a sequence, and the call before them, of many: the same tokens as by
    PyTorch's ops on the same numbers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=48, intermediate_size=72, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=60, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True,
           "return_dict_in_generate": True}  # fmt: skip
    ids = torch.randint(0, 60, (2, 20))
    fast: Any = turbotx.optimize(model, quantize=HOW, keep_float=())
    with torch.no_grad():
        own = fast.generate(ids, attention_mask=torch.ones_like(ids), **how)
        reference = turbotx.optimize(model, quantize=HOW, keep_float=(), backend="aten")
        again = reference(own.sequences).logits[:, 19:-1]
    torch.testing.assert_close(torch.stack(own.logits, 1), again, rtol=1e-4, atol=1e-5)
