"""Encoders over drawn mixtures: each token as in a call of its own text; and what is refused.

In: 24 encoders of transformers with small configs, `padding="packed"`, those that are like others
by the sweep only. Out: flat and padded calls
within 1.5 times the rounding of the model's own call, and a PackError that names the node.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

import turbotx
from tests.engine.test_packed import SIZES
from tests.models import assert_as_exact_as_eager, in_double, leaves
from turbotx.errors import PackError

transformers = pytest.importorskip("transformers")
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
DISTIL = {"vocab_size": 60, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
BART = {
    "vocab_size": 60, "d_model": 32, "encoder_layers": 2, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}  # fmt: skip
SMALL = {"embedding_size": 16}
FEW = 64
"""Numbers of which eager's largest error is no chance."""
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("BertModel", SIZES),
    "Roberta": ("RobertaModel", SIZES),
    "Camembert": ("CamembertForMaskedLM", SIZES),
    "XLMRoberta": ("XLMRobertaForSequenceClassification", SIZES),
    "XLMRobertaXL": ("XLMRobertaXLModel", SIZES),
    "DistilBert": ("DistilBertForSequenceClassification", DISTIL),
    "Albert": ("AlbertModel", SIZES | SMALL),
    "Electra": ("ElectraForTokenClassification", SIZES | SMALL),
    "MPNet": ("MPNetModel", SIZES),
    "ModernBert": ("ModernBertModel", SIZES | {"local_attention": 4, "pad_token_id": 0}),
    "NomicBert": ("NomicBertModel", SIZES | {"head_dim": 8}),
    "Ernie": ("ErnieModel", SIZES),
    "RemBert": ("RemBertModel", SIZES | {"input_embedding_size": 16}),
    "Data2VecText": ("Data2VecTextModel", SIZES),
    "RobertaPreLayerNorm": ("RobertaPreLayerNormModel", SIZES),
    "IBert": ("IBertModel", SIZES),
    "RoFormer": ("RoFormerModel", SIZES | SMALL),
    "MegatronBert": ("MegatronBertModel", SIZES),
    "T5": ("T5EncoderModel", T5),
    "UMT5": ("UMT5EncoderModel", T5),
    "M2M100": ("M2M100Model.encoder", BART),
    "MBart": ("MBartModel.encoder", BART),
    "ChineseCLIPText": ("ChineseCLIPTextModel", SIZES),
    "GPTJ": ("GPTJModel", {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4,
                           "rotary_dim": 4, "use_cache": False}),
}  # fmt: skip


def make(name: str, kind: str, sizes: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    kind, _, part = kind.partition(".")
    model: nn.Module = getattr(transformers, kind)(config).eval()
    return model.get_submodule(part)


@functools.cache
def three(name: str) -> tuple[nn.Module, Any, nn.Module]:
    """The model, optimized, and in float64: one of each for all mixtures."""
    model = make(name, *ENCODERS[name])
    return model, turbotx.optimize(model, padding="packed"), in_double(model)


AS_OTHERS = (
    "XLMRoberta", "Ernie", "Data2VecText", "ChineseCLIPText", "MegatronBert", "IBert", "RemBert",
    "MBart",
)  # fmt: skip
"""Layers, positions and heads that others here have, by another name or size: for the sweep."""
EACH = [
    pytest.param(name, marks=pytest.mark.sweep if name in AS_OTHERS else ()) for name in ENCODERS
]


@pytest.mark.parametrize("name", EACH)
@given(lengths=st.lists(st.integers(1, 13), min_size=1, max_size=6))
@example(lengths=[9, 1, 5, 12])
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@torch.no_grad()
def test_each_token_is_that_of_its_text_alone(name: str, lengths: list[int]) -> None:
    model, fast, wide = three(name)
    torch.manual_seed(sum(lengths))
    parts = [torch.randint(3, 60, (n,)) for n in lengths]
    found = leaves(fast.packed(input_ids=torch.cat(parts), lengths=lengths))
    eager, exact = ([leaves(m(**alone(part))) for part in parts] for m in (model, wide))
    three_each = zip(found, joined(eager, found), joined(exact, found), strict=True)
    for mine, own, true in three_each:
        if true.numel() >= FEW:
            assert_as_exact_as_eager([mine], [own], [true])
        else:
            torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5)
    assert fast.stats()["captures"] == 1


def alone(part: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": part[None], "attention_mask": torch.ones_like(part)[None]}


def joined(texts: list[list[torch.Tensor]], like: list[torch.Tensor]) -> list[torch.Tensor]:
    """Leaves of calls of one text each, as one of all has them: by token, or by text."""
    return [
        torch.cat([x[0] if x.ndim > whole.ndim else x for x in one])
        for whole, *one in zip(like, *texts, strict=True)
    ]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "MobileBert": ("MobileBertModel", SIZES | SMALL | {
        "intra_bottleneck_size": 16, "true_hidden_size": 16}, "constant_pad_nd"),
    "SqueezeBert": ("SqueezeBertModel", SIZES | {"embedding_size": 32}, "convolution"),
    "DebertaV2": ("DebertaV2Model", SIZES | {"relative_attention": True,
                                             "pos_att_type": ["c2p", "p2c"]}, "attention"),
    "Bloom": ("BloomModel", {"vocab_size": 60, "hidden_size": 32, "n_layer": 2, "n_head": 4,
                             "use_cache": False}, "attention"),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", REFUSED)
def test_what_looks_at_other_tokens_is_refused_by_name(name: str) -> None:
    kind, sizes, node = REFUSED[name]
    fast = turbotx.optimize(make(name, kind, sizes), padding="packed")
    ids = torch.randint(3, 60, (2, 9))
    with pytest.raises(PackError, match=rf"cannot pack \w+: {node}\w* \(.*\.py:\d+\) "):
        fast(input_ids=ids, attention_mask=(torch.arange(9) < torch.tensor([[9], [4]])).long())
