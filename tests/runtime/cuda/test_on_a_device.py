"""On a CUDA device: whole models against float64, in every way in which a call can run.

In: small models, half precision. Out: errors within the rule of all tests, plainly, captured and
replayed; the same from threads, on other streams and inside a caller's own graph. Skipped where
there is no device.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("triton", reason="Triton is for Linux only")

import transformers

import turbotx
from tests.passes.test_experts import Experts
from tests.torchao_weights import quantize, quantize_int4
from turbotx.engine.optimize import engine_of
from turbotx.errors import IndexOutOfRangeError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = ((2, 17), (1, 1), (3, 40), (1, 128), (2, 17))
SIZES: dict[str, Any] = {"vocab_size": 500, "hidden_size": 128, "num_hidden_layers": 2,
                         "num_attention_heads": 2, "intermediate_size": 256}  # fmt: skip


def make_bert(dtype: torch.dtype, **changed: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(**(SIZES | changed))
    return transformers.BertModel(config).eval().to("cuda", dtype)


def make_inputs(batch: int, seq: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, seq, dtype=torch.int64, device="cuda")
    mask[1::2, max(1, seq // 2) :] = 0
    return {"input_ids": torch.randint(0, 500, (batch, seq), device="cuda"), "attention_mask": mask}


@torch.no_grad()
def references(model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in float64, and how far from it one may be."""
    exact, own = copy.deepcopy(model).double()(**inputs)[0], model(**inputs)[0]
    allowed = 1.5 * (own - exact).abs().max()
    return exact, allowed + 2 * torch.finfo(own.dtype).eps * exact.abs().max()


def assert_right(model: nn.Module, fast: Callable[..., Any], inputs: dict[str, Any]) -> None:
    exact, allowed = references(model, inputs)
    assert (fast(**inputs)[0] - exact).abs().max() <= allowed  # False for a NaN


WAYS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float16": (torch.float16, {}),
    "bfloat16": (torch.bfloat16, {}),
    "float32": (torch.float32, {}),
    "float16, one after the other": (torch.float16, {"pdl": False}),
    "float16, norms stored": (torch.float16, {"norms": "store"}),
    "float16, cuBLAS": (torch.float16, {"gemms": "cublas"}),
}


@pytest.mark.parametrize(("dtype", "options"), WAYS.values(), ids=WAYS)
def test_a_model_is_right_at_every_shape(dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = make_bert(dtype)
    fast = turbotx.optimize(model, **options)
    for shape in SHAPES:
        inputs = make_inputs(*shape)
        for _ in range(3):  # plainly, captured, replayed
            assert_right(model, fast, inputs)
    assert fast.stats()["captures"] == 1
    assert fast.stats()["graph_captures"] == len(set(SHAPES))


# By how each is asked for: the mean cosine to the float model that it keeps at least.
QUANTIZED = {"int8": 0.995, "fp8": 0.99, "int8-weights": 0.999, "int4-weights": 0.97}


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_products_are_those_of_the_same_numbers(dtype: torch.dtype, kind: str) -> None:
    if kind == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 is multiplied from sm_89 on")
    model = make_bert(dtype, intermediate_size=640)
    fast = turbotx.optimize(model, quantize=kind)
    for shape in SHAPES:
        inputs = make_inputs(*shape)
        numerics = turbotx.explain(fast, **inputs).numerics(fast, **inputs)
        assert all(e.holds for e in numerics.launches)
        assert any(kind.replace("-", "_") in e.name for e in numerics.launches)
        assert numerics.likenesses[0].mean > QUANTIZED[kind]
        first, *more = (fast(**inputs)[0] for _ in range(3))  # plainly, captured, replayed
        assert all(torch.equal(first, other) for other in more)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(-1.5)
    torch.testing.assert_close(fast(**inputs)[0], model(**inputs)[0], rtol=0, atol=0.3)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["int8", "int8 weights", "int4 weights"])
def test_models_that_torchao_has_quantised_to_int8_or_int4(kind: str) -> None:
    model = make_bert(torch.float16, intermediate_size=640)
    if kind == "int4 weights":
        quantize_int4("Int4Tensor", model)
    else:
        quantize("stand-in", model, kind == "int8 weights")
    fast = turbotx.optimize(model)
    inputs = make_inputs(2, 17)
    numerics = turbotx.explain(fast, **inputs).numerics(fast, **inputs)
    assert all(e.holds for e in numerics.launches) and numerics.likenesses[0].mean > 0.995
    assert any(kind.replace(" ", "_") in e.name for e in numerics.launches)
    torch.testing.assert_close(fast(**inputs)[0], model(**inputs)[0], rtol=0, atol=0.1)


def test_the_arena_is_the_drivers_virtual_memory() -> None:
    pytest.importorskip("cuda.bindings.driver")
    fast = turbotx.optimize(make_bert(torch.float16))
    fast(**make_inputs(1, 8))
    pool = engine_of(fast).variants()[0].program.pool
    with pool.lease(1) as arena:
        address = arena.data_ptr
        assert arena.stable
    fast(**make_inputs(8, 512))
    with pool.lease(1) as arena:
        assert arena.data_ptr == address


def test_threads_on_streams_of_their_own() -> None:
    model = make_bert(torch.float16)
    fast, failed = turbotx.optimize(model), []
    given = [make_inputs(*shape) for shape in SHAPES[:4]]
    # Beforehand: while one thread traces a model, PyTorch lets no other call it as it was.
    wanted = [references(model, inputs) for inputs in given]

    def work(k: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(8):
                    got = fast(**given[k])[0]
                    exact, allowed = wanted[k]
                    assert (got - exact).abs().max() <= allowed
        except BaseException as error:
            failed.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed


def test_inside_a_graph_of_the_callers() -> None:
    model = make_bert(torch.float16)
    fast, inputs = turbotx.optimize(model), make_inputs(2, 24)
    fast(**inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = fast(**inputs)[0]
    inputs["input_ids"].random_(0, 500)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, fast(**inputs)[0])


def test_changed_parameters_are_seen_by_a_replayed_graph() -> None:
    model = make_bert(torch.float16)
    fast, inputs = turbotx.optimize(model), make_inputs(1, 24)
    for _ in range(3):
        fast(**inputs)
    with torch.no_grad():
        model.encoder.layer[0].output.LayerNorm.weight.mul_(1.5)
        model.encoder.layer[1].output.dense.weight.data = torch.randn(
            128, 256, device="cuda", dtype=torch.float16
        )
    for _ in range(3):
        assert_right(model, fast, inputs)


def test_an_index_out_of_range_is_reported_at_once_or_by_the_next_call() -> None:
    fast, inputs = turbotx.optimize(make_bert(torch.float16)), make_inputs(1, 8)
    wrong = {**inputs, "input_ids": inputs["input_ids"] + 1000}

    def twice() -> None:
        fast(**wrong)  # says so itself where the device was quick
        torch.cuda.synchronize()
        fast(**inputs)

    for _ in range(3):  # the plain run, the capture and a replay each report it
        fast(**inputs)
        with pytest.raises(IndexOutOfRangeError, match="input_ids"):
            twice()
        assert torch.isfinite(fast(**inputs)[0]).all()


def test_full_float32_and_tf32_follow_pytorchs_setting() -> None:
    model = make_bert(torch.float32)
    fast, inputs = turbotx.optimize(model), make_inputs(2, 40)
    exact = copy.deepcopy(model).double()(**inputs)[0]
    before = torch.backends.cuda.matmul.fp32_precision
    errors = {}
    try:
        for setting in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = setting
            errors[setting] = float((fast(**inputs)[0] - exact).abs().max())
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors["ieee"] < 1e-5 < errors["tf32"] < 1e-1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_experts_are_right_at_every_number_of_rows(dtype: torch.dtype) -> None:
    module = Experts(6, dtype=dtype).eval().cuda()
    fast = turbotx.optimize(module)
    for rows in (5, 1, 300, 70):
        x = torch.randn(rows, 24, dtype=dtype, device="cuda")
        with torch.no_grad():
            exact = module.in_double(x)[0]
            for _ in range(3):  # plainly, captured, replayed
                worst = (fast(x)[0] - exact).abs().max()
                assert worst <= 4 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_at_every_number_of_steps(
    layer: type[nn.RNNBase], dtype: torch.dtype
) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.norm = nn.Embedding(50, 32), nn.LayerNorm(48)
            self.steps = layer(32, 24, batch_first=True, bidirectional=True)

        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (self.norm(torch.tanh(self.steps(self.words(ids).relu())[0]) * 2),)

    model = Tagger().eval().to("cuda", dtype)
    fast = turbotx.optimize(model)
    for shape in SHAPES:
        inputs = {"ids": torch.randint(0, 50, shape, device="cuda")}
        for _ in range(3):  # plainly, captured, replayed
            assert_right(model, fast, inputs)
    assert fast.stats()["captures"] == 1
