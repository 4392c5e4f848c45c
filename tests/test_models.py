"""Real architectures, end to end: one capture for every shape, as exact as eager."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import turbotx
from benchmarks.parity import make_inputs
from tests.models import assert_as_exact_as_eager, in_double, leaves, small_model, token_inputs
from turbotx.engine.optimize import engine_of

ARCHITECTURES = ("bert", "distilbert", "roberta", "albert")
OTHERS = (
    "gpt2", "opt", "t5", "llama", "mistral", "vit", "bart", "modernbert", "openai-gpt",
    *(pytest.param(name, marks=pytest.mark.sweep) for name in ("electra", "qwen2")),
)  # fmt: skip
"""Electra's layers are BERT's, Qwen2's are Llama's with biases."""
QUICK = ((1, 1), (2, 17), (7, 2), (3, 128))
SLOW = ((1, 1), (2, 17), (1, 64))  # benchmarks/parity.py has the whole grid
DTYPES = (torch.float32, torch.bfloat16)
DEFAULTS = (("bert", torch.float32),)  # ALBERT's is 4,096 wide; MiniLM is there in bfloat16 too


def check(model: torch.nn.Module, shapes, token_types: bool = False) -> turbotx.OptimizedModule:
    fast, exact = turbotx.optimize(model), in_double(model)
    for batch, seq in shapes:
        inputs = token_inputs(batch, seq)
        with torch.no_grad():
            eager, reference = model(**inputs), exact(**inputs)
        ours = fast(**inputs)
        assert type(ours) is type(eager)
        assert_as_exact_as_eager(ours, eager, reference)
    assert fast.stats()["captures"] == 1
    return fast


SMALL = [
    *((name, torch.float32) for name in ARCHITECTURES),
    *((name, torch.bfloat16) for name in ("bert", "albert")),  # the others are BERT with less
]


@pytest.mark.parametrize(("architecture", "dtype"), SMALL, ids=str)
def test_small_models_at_any_shape(architecture: str, dtype: torch.dtype) -> None:
    fast = check(small_model(architecture, dtype), QUICK)
    built = fast.stats()["kernel_builds"]
    fast(**token_inputs(5, 33))
    assert fast.stats()["kernel_builds"] == built


@pytest.mark.parametrize("architecture", OTHERS)
def test_small_models_of_other_architectures(architecture: str) -> None:
    """benchmarks/architectures.py has their default sizes."""
    model = small_model(architecture)
    fast, exact = turbotx.optimize(model), in_double(model)
    for batch, seq in ((1, 1), (2, 17), (3, 40)):
        inputs = make_inputs(model, batch, seq, torch.float32)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        with torch.no_grad():
            eager, reference = model(**inputs), exact(**wide)
        assert_as_exact_as_eager(fast(**inputs), eager, reference)
    assert fast.stats()["captures"] == 1


@pytest.mark.parametrize("batch_first", [False, True])
def test_pytorchs_own_transformer(batch_first: bool) -> None:
    """Queries and keys by parts of one weight, heads beside the batch, the sequence first."""
    model = torch.nn.Transformer(32, 2, 1, 2, 48, batch_first=batch_first).eval()
    fast, exact = turbotx.optimize(model), in_double(model)
    for batch, source, target in ((2, 9, 7), (1, 1, 1), (3, 4, 11)):
        sizes = [(batch, n, 32) if batch_first else (n, batch, 32) for n in (source, target)]
        inputs = [torch.randn(*size) for size in sizes]
        with torch.no_grad():
            eager, reference = model(*inputs), exact(*(x.double() for x in inputs))
        assert_as_exact_as_eager(fast(*inputs), eager, reference)
    launches = engine_of(fast).variants()[0].assembly.launches
    assert {x.kind for x in launches} == {"gemm", "attention", "kernel"}


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_launches_a_layer(architecture: str) -> None:
    totals = []
    for layers in (1, 2):
        model = small_model(architecture, layers=layers)
        fast = turbotx.optimize(model, backend="aten")
        fast(**make_inputs(model, 2, 8, torch.float32))
        totals.append(len(engine_of(fast).variants()[0].assembly.launches))
    assert totals[1] - totals[0] <= 8


@pytest.mark.parametrize(
    "architecture, dtype",
    [
        pytest.param(name, dtype, marks=() if (name, dtype) in DEFAULTS else pytest.mark.sweep)
        for name in ARCHITECTURES
        for dtype in DTYPES
    ],
)
def test_default_configurations(architecture: str, dtype: torch.dtype) -> None:
    config = transformers.AutoConfig.for_model(architecture)
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).to(dtype).eval()
    check(model, SLOW)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minilm_with_its_real_weights(minilm_path, dtype: torch.dtype) -> None:
    model = transformers.BertModel.from_pretrained(minilm_path).to(dtype).eval()
    check(model, ((1, 1), (2, 17), (7, 40), (1, 128)))


@pytest.fixture(scope="module")
def bert() -> turbotx.OptimizedModule:
    """Two layers, called once."""
    torch.manual_seed(0)
    fast = turbotx.optimize(small_model("bert"))
    fast(**token_inputs(2, 9))
    return fast


def test_a_bert_layer_is_seven_launches(bert: turbotx.OptimizedModule) -> None:
    launches = engine_of(bert).variants()[0].assembly.launches
    layer = [x.name.rstrip("_0123456789") for x in launches[2:9]]
    assert layer == [
        "linear", "attention", "linear", "fused_add_layer_norm",
        "linear_gelu", "linear", "fused_add_layer_norm",
    ]  # fmt: skip
    assert len(launches) == 2 + 2 * 7 + 1  # embeddings and mask, two layers, the pooler


def test_no_mask_is_materialized(bert: turbotx.OptimizedModule) -> None:
    tensors = engine_of(bert).variants()[0].assembly.tensors.values()
    planned = [t for t in tensors if t.kind == "intermediate"]
    assert not any(str(t.shape).count("seq") > 1 for t in planned)


def test_steady_state_allocates_outputs_only(bert: turbotx.OptimizedModule) -> None:
    inputs = token_inputs(2, 17)
    outputs = leaves(bert(**inputs))
    chunks = bert.stats()["chunk_allocations"]
    with torch.profiler.profile(profile_memory=True) as profile:
        bert(**inputs)
    used = [e.self_cpu_memory_usage for e in profile.events()]  # a range counts what is in it too
    allocated = [n for n in used if n > 0]
    assert sum(allocated) == sum((x.nbytes + 63) // 64 * 64 for x in outputs)
    assert bert.stats()["chunk_allocations"] == chunks


def test_every_output_belongs_to_the_caller(bert: turbotx.OptimizedModule) -> None:
    first = bert(**token_inputs(2, 17))
    kept = first.last_hidden_state.clone()
    bert(**token_inputs(3, 40))
    torch.testing.assert_close(first.last_hidden_state, kept, rtol=0, atol=0)


def test_poisoned_memory_changes_nothing(
    bert: turbotx.OptimizedModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = token_inputs(3, 21)
    clean = bert(**inputs)
    monkeypatch.setenv("TURBOTX_POISON", "1")
    poisoned = bert(**inputs)
    torch.testing.assert_close(clean[0], poisoned[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_inside_the_gemm_is_as_exact_as_eager(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=176, vocab_size=500, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaModel(config).eval().to(dtype)
    fast = turbotx.optimize(model)
    exact = copy.deepcopy(model).double()
    for batch, seq in ((1, 1), (1, 7), (3, 33)):
        given = {"input_ids": torch.randint(0, 500, (batch, seq))}
        with torch.no_grad():
            wanted = exact(**given)[0]
            eager, ours = ((f(**given)[0].double() - wanted).abs().max() for f in (model, fast))
        assert ours <= 1.5 * eager + 2 * torch.finfo(dtype).eps * wanted.abs().max()
    assert fast.stats()["captures"] == 2  # without a mask, a length of 1 is not causal
    for compiled in engine_of(fast).variants():
        assert sum(x.gemm.gated for x in compiled.assembly.launches if x.kind == "gemm") == 1
