"""What surrounds a call decides it: autocast, default dtype, device, determinism, gradient mode.

In: models, called in and out of such states. Out: eager's dtypes and values, a variant each where
the state matters, the same one where it does not.
"""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import turbotx
from tests.models import small_model, token_inputs
from turbotx.capture.ambient import differences, read_ambient, watch_reads, without_autocast
from turbotx.engine.dynamo import compile_graph
from turbotx.errors import CaptureError, InputError, TurbotxError, VerifyError


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def autocast(dtype=torch.bfloat16, enabled=True):
    return torch.autocast("cpu", dtype, enabled=enabled)


class Block(nn.Module):
    """Products, a norm, a softmax, a residual: what transformers are made of."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm, self.mlp = nn.LayerNorm(width), nn.Linear(width, 2 * width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(torch.softmax(q @ k.mT / 4, -1) @ v)
        return F.gelu(self.mlp(x)), x


class Own(nn.Module):
    """Autocast switched within the model."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        with autocast(enabled=False):
            y = self.a(x.float())
        with autocast():
            z = self.b(y)
        return self.a(x), y, z


def close(got, wanted, loose=True) -> None:
    got, wanted = (torch.utils._pytree.tree_leaves(t) for t in (got, wanted))
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        limits = {"rtol": 2e-2, "atol": 2e-2} if loose else {}
        torch.testing.assert_close(a, b, **limits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", [True, False])
def test_in_and_out_of_autocast_by_turns(first, dtype) -> None:
    model = Block().eval()
    fast = turbotx.optimize(model)
    for k, on in enumerate((first, not first, first, not first)):
        x = torch.randn(2 + k, 3 + k, 16)
        with autocast(dtype, on):
            got, wanted = fast(x), model(x)
        assert wanted[0].dtype is (dtype if on else torch.float32)
        close(got, wanted, loose=on)
    assert fast.stats()["captures"] == 2


FUNCTIONS = {
    "einsum": lambda x: torch.einsum("bsh,bth->bst", x, x),
    "conv": lambda x: F.conv1d(x.mT, torch.ones(4, 8, 3)),
    "attention": lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
    "promotion": lambda x: torch.cat([x @ x.mT, x[..., :1]], -1),
    "higher": lambda x: F.mse_loss(x @ x.mT, (x @ x.mT).relu(), reduction="none"),
    "batched": lambda x: torch.baddbmm(torch.ones(1, 1, 1), x, x.mT, alpha=2.0),
    "numbers": lambda x: (x @ x.mT) * 0.1 + torch.tensor(0.5),
    "doubles": lambda x: x.double() @ x.double().mT,
    "a cast": lambda x: (x @ x.mT).float().sum(-1),
    "counts": lambda x: (x > 0).long().cumsum(1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_kind_of_op_under_autocast(name) -> None:
    function = FUNCTIONS[name]
    fast, x = turbotx.optimize(function), torch.randn(3, 5, 8)
    with autocast():
        close(fast(x), function(x))
    close(fast(x), function(x), loose=False)


def test_autocast_switched_in_the_model() -> None:
    model = Own().eval()
    fast = turbotx.optimize(model)
    for on in (True, False, True):
        with autocast(enabled=on):
            x = torch.randn(3, 8)
            close(fast(x), model(x))


def test_bert_in_and_out_of_autocast() -> None:
    model = small_model("bert")
    fast = turbotx.optimize(model)
    for on in (False, True, False, True):
        inputs = token_inputs(2, 9)
        with autocast(enabled=on):
            got, wanted = fast(**inputs), model(**inputs)
        assert got[0].dtype is wanted[0].dtype
        loose = {"rtol": 5e-2, "atol": 5e-2} if on else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(got[0], wanted[0], **loose)


def test_torch_compile_under_autocast() -> None:
    model = Block().eval()
    fast = torch.compile(model, backend=compile_graph, dynamic=True)
    for on in (True, False, True):
        x = torch.randn(3, 4, 16)
        with autocast(enabled=on):
            close(fast(x), model(x), loose=on)


def test_threads_of_different_states() -> None:
    model = Block().eval()
    fast = turbotx.optimize(model)
    for on in (True, False):
        with autocast(enabled=on):
            fast(torch.randn(2, 3, 16))
    failed: list[object] = []

    def work(on: bool) -> None:
        with torch.no_grad(), autocast(enabled=on):
            for k in range(20):
                x = torch.randn(1 + k % 4, 5, 16)
                try:
                    close(fast(x), model(x), loose=on)
                except BaseException as error:
                    failed.append(error)

    threads = [threading.Thread(target=work, args=(on,)) for on in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and fast.stats()["captures"] == 2


def test_weights_change_under_autocast() -> None:
    model = Block().eval()
    fast, x = turbotx.optimize(model), torch.randn(2, 3, 16)
    with autocast():
        fast(x)
        model.out.weight.mul_(-3)
        close(fast(x), model(x))
    close(fast(x), model(x))


def test_nothing_is_left_of_a_capture() -> None:
    model = nn.Linear(8, 8)  # whose weights autocast would cache
    fast, x = turbotx.optimize(model.eval()), torch.randn(2, 8)
    with torch.enable_grad(), autocast():
        fast(x)
        assert torch.is_autocast_cache_enabled() and torch.is_autocast_enabled("cpu")
        assert torch.equal(model(x), fast(x))


def test_default_dtype() -> None:
    function = turbotx.optimize(lambda x: x + torch.ones(3) / 3)
    x = torch.arange(3)
    try:
        for dtype in (torch.float32, torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            got = function(x)
            assert got.dtype is dtype
            torch.testing.assert_close(got, x + torch.ones(3) / 3)
    finally:
        torch.set_default_dtype(torch.float32)


def ask(x):
    if torch.is_grad_enabled():
        x = x * 2
    if torch.are_deterministic_algorithms_enabled():
        x = x + 10
    if torch.get_float32_matmul_precision() == "high":
        x = x + 100
    return x - 1


def test_what_a_model_asks_for() -> None:
    fast, x = turbotx.optimize(ask), torch.ones(3)
    assert torch.equal(fast(x), ask(x))
    with torch.enable_grad():
        assert torch.equal(fast(x), ask(x))
    try:
        torch.use_deterministic_algorithms(True)
        assert torch.equal(fast(x), ask(x))
        torch.set_float32_matmul_precision("high")
        assert torch.equal(fast(x), ask(x))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(fast(x), ask(x))
    assert fast.stats()["captures"] == 4


def test_the_number_of_threads_is_asked_for() -> None:
    def function(x):
        return x * torch.get_num_threads()

    fast, x = turbotx.optimize(function, backend="aten"), torch.ones(2, 3)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            torch.testing.assert_close(fast(x), function(x))
    finally:
        torch.set_num_threads(before)
    assert fast.stats()["captures"] == 2


@pytest.mark.parametrize(
    "ask", [lambda x: x.requires_grad, lambda x: x.is_inference(), lambda x: x.grad_fn is None]
)
def test_whether_a_tensor_has_gradients_is_refused(ask) -> None:
    with pytest.raises(CaptureError, match="of a tensor, which a trace does not know"):
        turbotx.optimize(lambda x: x * 2 if ask(x + 1) else x)(torch.ones(2, 3))


def test_what_nobody_asks_for_makes_no_variant() -> None:
    model = Block().eval()
    fast, x = turbotx.optimize(model), torch.randn(2, 3, 16)
    fast(x)
    with torch.enable_grad():
        fast(x)
    with torch.inference_mode():
        fast(torch.randn(3, 3, 16))
    try:
        torch.use_deterministic_algorithms(True)
        torch.set_float32_matmul_precision("high")
        close(fast(x), model(x))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        close(fast(x), model(x))
    assert fast.stats()["captures"] == 1


def test_a_first_call_in_inference_mode() -> None:
    model = Block().eval()
    fast = turbotx.optimize(model)
    with torch.inference_mode():
        x = torch.randn(2, 3, 16)
        close(fast(x), model(x))


def test_a_first_call_in_inference_mode_and_autocast() -> None:
    layer = nn.Linear(16, 16).eval()
    for plain in (Block().eval(), lambda x: F.linear(x, layer.weight * 2, layer.bias)):
        fast = turbotx.optimize(plain, backend="aten")
        with torch.inference_mode(), autocast():
            x = torch.randn(2, 3, 16)
            close(fast(x), plain(x))


def test_constants_of_code_that_is_traced_in_inference_mode() -> None:
    def model(x):
        return x * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor(0.5)

    fast, x = turbotx.optimize(model), torch.randn(2, 3)
    with torch.inference_mode():
        assert torch.equal(fast(x), model(x))
    with torch.inference_mode(), autocast():
        assert torch.equal(fast(x), model(x))
    assert torch.equal(fast(x), model(x))


def test_a_tensor_without_a_version_is_refused_by_name() -> None:
    with torch.inference_mode():
        kept = torch.ones(3)
    with pytest.raises(CaptureError, match=r"made under torch\.inference_mode"):
        turbotx.optimize(lambda x: x * kept)(torch.ones(3))


def test_encoder_layers_that_a_fused_op_would_run_are_refused_under_autocast() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    fast, x = turbotx.optimize(layer, backend="aten"), torch.randn(2, 3, 16)
    with autocast(), pytest.raises(CaptureError, match="set_fastpath_enabled"):
        fast(x)
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with autocast():
            close(fast(x), layer(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    close(fast(x), layer(x))


class Counting(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.called = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.called.append(func)
        return func(*args, **(kwargs or {}))


def test_modes_that_intercept_functions() -> None:
    fast, x = turbotx.optimize(lambda x: x + 1), torch.ones(3)
    fast(x)
    with torch.device("cpu"):
        assert torch.equal(fast(x), x + 1)
    with Counting() as mode:  # what intercepts functions sees those of the model
        assert torch.equal(fast(x), x + 1)
    assert torch.Tensor.add in mode.called


def test_saved_models_know_their_state(tmp_path) -> None:
    model = Block().eval()
    fast, x = turbotx.optimize(model), torch.randn(2, 3, 16)
    with autocast():
        fast(x)
    turbotx.save(fast, tmp_path / "cast.ttx")
    loaded = turbotx.load(tmp_path / "cast.ttx")
    with autocast():
        close(loaded(x), model(x))
    with pytest.raises(InputError, match="autocast"):
        loaded(x)
    with autocast(torch.float16), pytest.raises(InputError, match="float16"):
        loaded(x)
    fast(x)
    turbotx.save(fast, tmp_path / "both.ttx")
    loaded = turbotx.load(tmp_path / "both.ttx")
    for on in (True, False, True):
        with autocast(enabled=on):
            close(loaded(x), model(x))
    try:
        torch.set_default_dtype(torch.float64)
        with pytest.raises(InputError, match="default_dtype"):
            loaded(x)
    finally:
        torch.set_default_dtype(torch.float32)


def test_saved_models_know_what_was_asked(tmp_path) -> None:
    fast, x = turbotx.optimize(ask), torch.ones(3)
    fast(x)
    turbotx.save(fast, tmp_path / "asks.ttx")
    loaded = turbotx.load(tmp_path / "asks.ttx")
    assert torch.equal(loaded(x), ask(x))
    with torch.enable_grad(), pytest.raises(TurbotxError, match="is_grad_enabled"):
        loaded(x)


def test_reading_and_telling() -> None:
    now = read_ambient()
    assert now == read_ambient() and hash(now) == hash(read_ambient())
    with autocast():
        told = differences(read_ambient(), now, ())
        assert told == ["torch.autocast: torch.bfloat16 on cpu now, off then"]
        with without_autocast():
            assert read_ambient() == now
        assert read_ambient() != now
    with watch_reads(now) as asked:
        assert torch.is_grad_enabled() is False
        torch.nn.functional.relu(torch.ones(1))
    assert asked == {10}


def test_a_result_of_another_dtype_is_not_written() -> None:
    from turbotx.runtime.aten import call_into

    x, aten = torch.ones(4, 4), torch.ops.aten
    with pytest.raises(VerifyError, match="bfloat16"):
        call_into(aten.exp.default, (x,), {}, [torch.empty(4, 4, dtype=torch.bfloat16)], False)
    with pytest.raises(VerifyError, match=r"\(4, 4\)"):
        call_into(aten.exp.default, (x,), {}, [torch.empty(4, 5)], False)
