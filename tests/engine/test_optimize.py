"""What `turbotx.optimize` promises to its caller."""

from __future__ import annotations

import copy
import pickle
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import turbotx
from tests.capture.test_tracing import together
from tests.models import small_model, token_inputs
from turbotx.engine.optimize import engine_of
from turbotx.errors import (
    BuildWarning,
    CaptureError,
    IndexOutOfRangeError,
    InputError,
    OptionsError,
    TrainingError,
)
from turbotx.program.executable import CalledLaunch


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x, flip: bool = False):
        y = torch.relu(self.linear(self.norm(x))) * self.scale
        return {"out": -y if flip else y, "mean": (y.mean(-1), None)}


X = torch.randn(3, 5, 8)


def same(ours, theirs) -> None:
    torch.testing.assert_close(ours["out"], theirs["out"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["mean"][0], theirs["mean"][0], rtol=1e-5, atol=1e-6)
    assert ours["mean"][1] is None


def test_a_module() -> None:
    model = Block().eval()
    fast = turbotx.optimize(model)
    same(fast(X), model(X))
    assert isinstance(fast, nn.Module)


def test_a_class_bare_and_with_options() -> None:
    for made in (turbotx.optimize(Block), turbotx.optimize(planner="greedy")(Block)):
        model = made().eval()
        assert isinstance(model, Block)
        same(model(X), Block.forward(model, X))
        assert model.stats()["captures"] == 1
        assert made.__name__ == "Block"


def test_a_function_bare_and_with_options() -> None:
    @turbotx.optimize
    def plain(x, *, power=2.0):
        """Doc."""
        return (x**power).softmax(-1)

    @turbotx.optimize(planner="chunked")
    def optioned(x, y):
        return x.exp() + y

    torch.testing.assert_close(plain(X), (X**2).softmax(-1))
    torch.testing.assert_close(plain(X, power=3.0), (X**3).softmax(-1))
    torch.testing.assert_close(optioned(X, X[0]), X.exp() + X[0])
    assert plain.__doc__ == "Doc."
    assert plain.stats()["captures"] == 2


def test_a_variant_per_signature() -> None:
    fast = turbotx.optimize(Block().eval())
    fast(X)
    fast(X[:1, :1])
    assert fast.stats()["captures"] == 1
    fast(X, True)
    fast(X, flip=True)
    fast(X[0])
    assert fast.stats()["captures"] == 4


def test_size_one_at_the_first_call_is_no_special_case() -> None:
    model = Block().eval()
    fast = turbotx.optimize(model)
    for shape in ((1, 1), (1, 7), (7, 1), (4, 3)):
        x = torch.randn(*shape, 8)
        same(fast(x), model(x))
    assert fast.stats()["captures"] == 1


def test_broadcast_inputs_keep_their_meaning() -> None:
    @turbotx.optimize
    def add(x, y):
        return x + y

    for a, b in (((4, 3), (1, 3)), ((4, 3), (4, 3)), ((1, 3), (4, 3)), ((4, 1), (4, 3))):
        x, y = torch.randn(a), torch.randn(b)
        torch.testing.assert_close(add(x, y), x + y)


@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (1, 1, 8)])
def test_empty_and_tiny_inputs(shape) -> None:
    model = Block().eval()
    x = torch.randn(shape)
    same(turbotx.optimize(model)(x), model(x))


def test_inputs_that_are_not_contiguous() -> None:
    model = Block().eval()
    fast = turbotx.optimize(model)
    same(fast(X.transpose(0, 1)), model(X.transpose(0, 1)))
    same(fast(X[:, ::2]), model(X[:, ::2]))
    same(fast(X[:1].expand(3, 5, 8)), model(X[:1].expand(3, 5, 8)))


def test_parameters_are_the_originals_own() -> None:
    model = Block().eval()
    fast = turbotx.optimize(model)
    fast(X)
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
    assert fast.linear is model.linear
    assert list(fast.state_dict()) == list(model.state_dict())
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in model.named_parameters()]


def change_in_place(model) -> None:
    model.linear.weight.mul_(-1)


def replace_parameter(model) -> None:
    model.linear.weight = nn.Parameter(torch.randn(8, 8))


def load_another_state(model) -> None:
    model.load_state_dict(Block().state_dict())


def change_a_buffer(model) -> None:
    model.scale.fill_(5.0)


def swap_the_data(model) -> None:
    model.linear.weight.data = torch.randn(8, 8)


@pytest.mark.parametrize(
    "change",
    [change_in_place, replace_parameter, load_another_state, change_a_buffer, swap_the_data],
)
@pytest.mark.parametrize("rows", [1, 15])
def test_weight_updates_are_seen(change, rows: int) -> None:
    model = Block().eval()
    fast = turbotx.optimize(model)
    x = torch.randn(1, rows, 8)
    fast(x)
    with torch.no_grad():
        change(model)
    same(fast(x), model(x))
    assert fast.stats()["captures"] == 1


def test_moving_to_another_dtype_captures_again() -> None:
    fast = turbotx.optimize(Block().eval())
    fast(X)
    half = fast.to(torch.bfloat16)
    assert half is fast
    assert fast(X.bfloat16())["out"].dtype is torch.bfloat16


def test_copies_and_pickles() -> None:
    fast = turbotx.optimize(Block().eval())
    expected = fast(X)
    same(copy.deepcopy(fast)(X), expected)
    same(pickle.loads(pickle.dumps(fast))(X), expected)


def test_training_mode_is_refused() -> None:
    fast = turbotx.optimize(Block())
    with pytest.raises(TrainingError, match=r"call model\.eval\(\) first"):
        fast(X)
    fast.eval()(X)
    fast.train()
    with pytest.raises(TrainingError):
        fast(X)


def test_gradients_are_refused() -> None:
    fast = turbotx.optimize(Block().eval())
    wanted = X.clone().requires_grad_()
    for _ in range(2):
        with pytest.raises(TrainingError, match="requires grad"):
            fast(wanted)
        fast(X)
    with torch.no_grad():
        fast(wanted)


def test_unknown_options_name_the_nearest() -> None:
    with pytest.raises(OptionsError, match="did you mean 'planner'"):
        turbotx.optimize(Block(), planer="greedy")
    with pytest.raises(OptionsError, match="'symbolic', 'chunked', 'greedy'"):
        turbotx.optimize(Block(), planner="best")
    with pytest.raises(OptionsError, match="not 3"):
        turbotx.optimize(3)


def test_a_size_by_values_names_the_users_line() -> None:
    def choose(x):
        return x.exp()[: int(x.sum())]  # the line that the error must show

    with pytest.raises(CaptureError, match="the line that the error must show"):
        turbotx.optimize(choose)(X)


def test_an_index_out_of_range_is_an_error_and_loses_nothing() -> None:
    model = small_model("bert", layers=1)
    fast = turbotx.optimize(model)
    inputs = token_inputs(2, 5)
    expected = fast(**inputs)[0]
    bad = dict(inputs, input_ids=inputs["input_ids"] + 1000)
    with pytest.raises(IndexOutOfRangeError, match="'input_ids'"):
        fast(**bad)
    torch.testing.assert_close(fast(**inputs)[0], expected, rtol=0, atol=0)


def test_one_tensor_passed_twice_is_two_arguments() -> None:
    @turbotx.optimize
    def combine(x, y):
        return x - 2 * y

    a, b = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(combine(a, a), -a)
    torch.testing.assert_close(combine(a, b), a - 2 * b)


def test_broadcasts_are_aligned_from_the_right_too() -> None:
    @turbotx.optimize
    def add(x, y):
        return x + y

    for a, b in (((5, 5, 1), (1, 5)), ((2, 3, 1), (1, 4)), ((7,), (3, 1))):
        x, y = torch.randn(a), torch.randn(b)
        torch.testing.assert_close(add(x, y), x + y)


def test_sizes_of_1_that_only_broadcast_once_the_dims_have_moved() -> None:
    @turbotx.optimize
    def combine(x, y):
        return (x.flatten() + y.transpose(0, 1)).tanh()

    for shape in ((1, 1), (1, 4), (3, 1)):
        x, y = torch.randn(shape), torch.randn(shape[1], 1)
        torch.testing.assert_close(combine(x, y), (x.flatten() + y.transpose(0, 1)).tanh())


def test_a_roll_further_than_the_row_is_long() -> None:
    @turbotx.optimize
    def rolled(x):
        return x.roll((5, -7), (0, 1)) * 2

    for n in (9, 3, 1):
        x = torch.randn(n, n + 1)
        torch.testing.assert_close(rolled(x), x.roll((5, -7), (0, 1)) * 2)


def test_a_value_repeated_and_read_backwards() -> None:
    def function(x):
        y = torch.sigmoid(x).repeat_interleave(2, 0)
        return torch.minimum(y, y), y.flip(0)

    x = torch.randn(5)
    for ours, eager in zip(turbotx.optimize(function)(x), function(x), strict=True):
        torch.testing.assert_close(ours, eager)


def test_a_call_without_tensors_is_refused() -> None:
    with pytest.raises(CaptureError, match="no tensor among its arguments"):
        turbotx.optimize(lambda n: torch.zeros(3) + n)(2)


def test_sparse_and_foreign_inputs_are_refused() -> None:
    @turbotx.optimize
    def double(x):
        return x * 2

    with pytest.raises(InputError, match="meta"):
        double(torch.empty(3, device="meta"))
    with pytest.raises(InputError, match="dense tensors only"):
        double(torch.eye(3).to_sparse())


def test_threads_share_one_module() -> None:
    model = small_model("bert", layers=1)
    fast = turbotx.optimize(model)
    cases = [token_inputs(b, s) for b, s in ((1, 5), (2, 9), (3, 30), (2, 17))]
    with torch.no_grad():
        expected = [model(**c)[0] for c in cases]

    def work(k: int) -> None:
        for i in range(12):
            case = (i + k) % len(cases)
            found = fast(**cases[case])[0]
            torch.testing.assert_close(found, expected[case], rtol=1e-4, atol=1e-5)

    together(*(partial(work, k) for k in range(4)))
    assert fast.stats()["captures"] == 1


def test_without_a_compiler_regions_run_through_pytorch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "")
    # What could not be built is remembered for a folder of caches: not for the other tests'.
    monkeypatch.setenv("TURBOTX_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    model = small_model("bert", layers=1)
    fast = turbotx.optimize(model)
    inputs = token_inputs(3, 9)
    with pytest.warns(BuildWarning, match="no C\\+\\+ compiler") as seen:
        ours = fast(**inputs)
    assert len(seen) == 1
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(ours[0], model(**inputs)[0])
        fast(**token_inputs(1, 4))


def test_without_packed_weights() -> None:
    model = small_model("bert", layers=1)
    inputs = token_inputs(2, 9)
    fast = turbotx.optimize(model, pack_weights=False)
    with torch.no_grad():
        torch.testing.assert_close(fast(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-5)
    program = engine_of(fast).variants()[0].program
    assert not program.runtime.packings
    called = [x for x in program.executable.launches if isinstance(x, CalledLaunch)]
    assert called and not any("gelu" in x.name for x in called)  # PyTorch runs the products alone


def test_the_aten_backend_means_the_same() -> None:
    model = small_model("distilbert", layers=1)
    inputs = token_inputs(2, 9)
    ours = turbotx.optimize(model, backend="aten")(**inputs)
    torch.testing.assert_close(ours[0], turbotx.optimize(model)(**inputs)[0])


def test_reserve_takes_the_memory_at_once() -> None:
    fast = turbotx.optimize(small_model("bert", layers=1))
    fast(**token_inputs(1, 2))
    fast.reserve(batch=4, seq=256)
    before = fast.stats()["chunk_allocations"]
    for batch, seq in ((4, 256), (1, 200), (3, 100)):
        fast(**token_inputs(batch, seq))
    assert fast.stats()["chunk_allocations"] == before
    with pytest.raises(InputError, match="length"):
        fast.reserve(length=3)


def test_the_rewritten_graph_is_an_ordinary_graph_module() -> None:
    model = small_model("bert", layers=1)
    fast = turbotx.optimize(model)
    inputs = token_inputs(2, 9)
    with torch.no_grad():
        fast(**inputs)
        outputs = fast.graph(*inputs.values())
        torch.testing.assert_close(outputs[0], model(**inputs)[0])
    assert "fused_add_layer_norm_0" in fast.graph.code


def test_calls_that_differ_in_anything_but_sizes_have_variants_of_their_own() -> None:
    @turbotx.optimize
    def scale(x, by=1, extra=None):
        return x * by if extra is None else x * by + extra

    x = torch.ones(2, 3)
    assert scale(x, 2).dtype == torch.float32
    assert scale(x, True).dtype == torch.float32
    assert scale(x.int(), 2).dtype == torch.int32
    assert scale(x.int(), 2.0).dtype == torch.float32
    assert torch.equal(scale(x, extra=x), x + x)
    assert torch.equal(scale(x, by=2, extra=x), 3 * x)
    assert torch.equal(scale(torch.ones(5, 4), 2), torch.full((5, 4), 2.0))
    assert scale.stats()["captures"] == 6
