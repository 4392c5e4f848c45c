"""Int8 models: what comes out, for any shape, beside the reference of the same integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import turbotx
from benchmarks.int8_fidelity import sentences
from tests.kernels.cpp.cpp_probe import needs_compiler
from turbotx import ir
from turbotx.errors import OptionsError

pytestmark = needs_compiler


class Block(nn.Module):
    """A transformer's layer without attention, and a head."""

    def __init__(self, width: int = 24, inner: int = 40, norm: type[nn.Module] = nn.LayerNorm):
        super().__init__()
        self.norm, self.last = norm(width), norm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.gate = nn.Linear(width, 2 * inner, bias=False)
        self.head = nn.Linear(width, 7)

    def forward(self, x: torch.Tensor) -> Any:
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        gate, factor = self.gate(self.norm(x)).chunk(2, -1)
        x = self.last(x + self.down(F.silu(gate) * factor))
        return x, self.head(x)


def made(dtype: torch.dtype = torch.float32, **how: Any) -> nn.Module:
    torch.manual_seed(3)
    return Block(**how).eval().to(dtype)


def launches(fast: Any, *args: torch.Tensor) -> list[str]:
    report = turbotx.explain(fast, *args)
    return [x.name for x in report.compiled.assembly.launches]


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("dtype", "norm"), [*((d, nn.LayerNorm) for d in DTYPES), (torch.float32, nn.RMSNorm)]
)
@pytest.mark.parametrize("how", ["int8", "int8-weights"])
def test_it_is_the_reference_and_near_the_float_model(
    dtype: torch.dtype, norm: type[nn.Module], how: Any
) -> None:
    model = made(dtype, norm=norm)
    fast, reference = (turbotx.optimize(model, quantize=how, backend=b) for b in ("cpp", "aten"))
    x = torch.randn(3, 5, 24).to(dtype)
    with torch.no_grad():
        ours, own, plain = fast(x), reference(x), model(x)
    tolerance = {torch.float32: 1e-2, torch.bfloat16: 6e-2, torch.float16: 2e-2}[dtype]
    for a, b, c in zip(ours, own, plain, strict=True):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)  # some number rounds to the other
        assert F.cosine_similarity(a.float(), c.float(), -1).min() > 0.999


@pytest.mark.parametrize("how", ["int8", "int8-weights"])
@pytest.mark.parametrize("batch", [1, 4])
def test_every_launch_keeps_the_rule_and_likeness_is_told_apart(how: Any, batch: int) -> None:
    model, x = made(), torch.randn(batch, 9, 24)
    fast = turbotx.optimize(model, quantize=how)
    report = turbotx.explain(fast, x)
    numerics = report.numerics(fast, x)
    assert numerics.holds and not numerics.outputs
    assert [e.rows for e in numerics.likenesses] == [9 * batch, 9 * batch]
    assert 0.999 < numerics.likenesses[0].worst <= numerics.likenesses[0].mean < 1
    for errors in report.stress(x).values():
        assert all(e.holds for e in errors)


@pytest.mark.parametrize("how", ["int8", "int8-weights"])
def test_it_takes_as_many_launches_as_without(how: Any) -> None:
    x = torch.randn(2, 4, 24)
    plain = launches(turbotx.optimize(made()), x)
    narrow = launches(turbotx.optimize(made(), quantize=how), x)
    assert len(narrow) == len(plain)
    assert sum("int8" in name for name in narrow) == 4
    assert "linear_0" in narrow, "the head stays float"


@settings(max_examples=12)
@given(st.integers(0, 5), st.integers(0, 40))
def test_one_program_serves_every_shape(batch: int, seq: int) -> None:
    x = torch.randn(batch, seq, 24)
    with torch.no_grad():
        (ours, _), (plain, _) = FAST(x), MODEL(x)
    assert ours.shape == plain.shape
    assert (ours - plain).abs().amax() < 0.1 if ours.numel() else True


MODEL = made()
FAST = turbotx.optimize(MODEL, quantize="int8")


def test_views_of_inputs_and_new_weights() -> None:
    model = made()
    fast = turbotx.optimize(model, quantize="int8")
    x = torch.randn(24, 6, 3).permute(2, 1, 0)
    with torch.no_grad():
        torch.testing.assert_close(fast(x)[0], model(x)[0], rtol=0, atol=0.1)
        model.up.weight.mul_(-1.5)
        torch.testing.assert_close(fast(x)[0], model(x)[0], rtol=0, atol=0.1)


def test_a_row_with_nan_or_infinity_is_nan_and_no_other() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    fast = turbotx.optimize(model, quantize="int8", keep_float=())
    x = torch.randn(4, 8)
    x[0, 1], x[2, 3] = torch.nan, torch.inf
    with torch.no_grad():
        assert fast(x).isnan().all(-1).tolist() == [True, False, True, False]


def test_rows_of_zeros_give_the_bias() -> None:
    model = nn.Linear(8, 3).eval()
    fast = turbotx.optimize(model, quantize="int8", keep_float=())
    with torch.no_grad():
        assert torch.equal(fast(torch.zeros(2, 8)), model.bias.expand(2, 3))


def test_nothing_is_quantised_unasked_and_a_capture_serves_one_option() -> None:
    x = torch.randn(2, 4, 24)
    assert not any("int8" in name for name in launches(turbotx.optimize(made()), x))
    fast = turbotx.optimize(made(), quantize="int8")
    fast(x)
    again = turbotx.optimize(fast)
    assert not any("int8" in name for name in launches(again, x))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantize": "int4"}, "quantize='int4' is not one of"),
        ({"quantize": "int8", "pack_weights": False}, "leave out pack_weights=False"),
        ({"quantize": "int8", "keep_float": "head"}, "must be a list of patterns"),
        ({"quantize": "int8", "keep_float": ("heads",)}, "fits no module of Block"),
    ],
)
def test_refusals(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionsError, match=says):
        turbotx.optimize(made(), **options)


@pytest.mark.parametrize(
    ("how", "mean", "worst"), [("int8", 0.995, 0.98), ("int8-weights", 0.999, 0.998)]
)
def test_minilm_keeps_its_embeddings(minilm_path: str, how: Any, mean: float, worst: float) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel.from_pretrained(minilm_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path)
    given = dict(tokenizer(sentences()[:40], padding=True, return_tensors="pt"))
    fast = turbotx.optimize(model, quantize=how)
    shown = given["attention_mask"][..., None]
    with torch.no_grad():
        ours, plain = (
            F.normalize((m(**given)[0] * shown).sum(1) / shown.sum(1), dim=-1)
            for m in (fast, model)
        )
    cosines = (ours * plain).sum(-1)
    assert cosines.mean() >= mean and cosines.min() > worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_generates_by_int8_weights(dtype: torch.dtype) -> None:
    """Its steps, of one row a sequence, and the call before them, of many."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2,
        n_embd=64,
        n_head=2,
        vocab_size=60,
        n_positions=80,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval().to(dtype)
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True,
           "return_dict_in_generate": True}  # fmt: skip
    ids = torch.randint(0, 60, (2, 20))
    with torch.no_grad():
        own, plain = (
            m.generate(ids, attention_mask=torch.ones_like(ids), **how)
            for m in (turbotx.optimize(model, quantize="int8-weights", keep_float=()), model)
        )
        again = model(own.sequences).logits[:, 19:-1]
    assert own.sequences.shape == plain.sequences.shape
    ours = torch.stack(own.logits, 1)
    assert F.cosine_similarity(ours.float(), again.float(), -1).min() > 0.999


def test_int8_operands_of_a_launch() -> None:
    report = turbotx.explain(turbotx.optimize(made(), quantize="int8"), torch.randn(2, 4, 24))
    gemms = [x for x in report.compiled.assembly.launches if isinstance(x, ir.GemmLaunch)]
    assert [x.int8 is not None for x in gemms] == [True] * 4 + [False]
    own = [x.int8.x_scale is not None for x in gemms if x.int8 is not None]
    assert own == [True, False, True, False]
    assert str(report) and report.to_html()


def test_the_library_of_the_products_to_come_is_built_while_tracing(monkeypatch) -> None:
    started: list[str] = []
    monkeypatch.setattr("turbotx.engine.engine.start_libraries", started.extend)
    for how, library in (("int8-weights", "quantized"), ("none", "products")):
        turbotx.optimize(Block().eval(), quantize=how)(torch.randn(2, 3, 24))
        assert started[-2:] == ["runtime", library]
