"""Remembering fake mode: equal layers are worked out once, to what each would be by itself."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import turbotx
from turbotx.capture import trace
from turbotx.capture.fake_mode import RememberingFakeMode
from turbotx.capture.trace import Captured, capture
from turbotx.errors import CaptureError
from turbotx.ir.expr import expr


class Layer(nn.Module):
    """Views, a split, products, a norm, and a write in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).split(8, dim=-1)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
        made = nn.functional.scaled_dot_product_attention(q, k, v)
        made = made.transpose(1, 2).reshape(x.shape)
        made += 1
        return x + made


class Layers(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@contextmanager
def counted() -> Iterator[collections.Counter[str]]:
    """Count what PyTorch works out, op by op."""
    found: collections.Counter[str] = collections.Counter()
    plain = vars(FakeTensorMode)["_dispatch_impl"]

    def dispatch(self: Any, func: Any, *rest: Any) -> Any:
        found[str(func)] += 1
        return plain(self, func, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeTensorMode, "_dispatch_impl", dispatch)
        yield found


def describe(captured: Captured) -> list[Any]:
    rows = []
    for node in captured.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            sizes = (*value.shape, *value.stride(), value.storage_offset())
            first = node.args[0].meta.get("val") if node.all_input_nodes else None
            memory = value.untyped_storage()._cdata
            shows = isinstance(first, FakeTensor) and first.untyped_storage()._cdata == memory
            nbytes = expr(value.untyped_storage().nbytes()).expand()
            rows.append((str(node.target), value.dtype, list(map(expr, sizes)), shows, nbytes))
    return rows


def test_results_are_those_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Layers(3).eval(), torch.randn(2, 5, 8)
    found = describe(capture(model, (x,), {}))
    monkeypatch.setattr(trace, "remembering_fakes", nullcontext)
    assert found == describe(capture(model, (x,), {}))
    assert len(found) > 30


def test_equal_layers_are_worked_out_once() -> None:
    x = torch.randn(2, 5, 8)
    with counted() as few:
        capture(Layers(2).eval(), (x,), {})
    with counted() as many:
        capture(Layers(6).eval(), (x,), {})
    written = {name for name in many if name.startswith("aten.add_")}
    assert {name for name in many if many[name] > few[name]} == written  # a write is done anew
    assert few["aten.native_layer_norm.default"] <= 2  # of the input, and of a layer's result


def make(values: torch.Tensor, mode: FakeTensorMode) -> Any:
    return mode.from_tensor(values)


@pytest.fixture
def mode() -> RememberingFakeMode:
    return RememberingFakeMode(shape_env=ShapeEnv())


def test_a_view_is_of_its_own_argument(mode: RememberingFakeMode) -> None:
    x, y = make(torch.randn(2, 6), mode), make(torch.randn(2, 6), mode)
    for view in (lambda t: t.view(3, 4), lambda t: t[:, 1:], lambda t: t.split(2, 1)[1]):
        for one in (x, y):
            assert view(one).untyped_storage()._cdata == one.untyped_storage()._cdata
        assert view(x).shape == view(y).shape and view(x).storage_offset() == (
            view(y).storage_offset()
        )
    turned = x.view(torch.int32)
    assert turned.dtype == torch.int32 and y.view(torch.int32).dtype == torch.int32
    assert torch.view_as_complex(make(torch.randn(3, 2), mode)).dtype == torch.complex64
    again = torch.view_as_complex(make(torch.randn(3, 2), mode))
    assert (again.dtype, tuple(again.stride())) == (torch.complex64, (1,))
    waves = make(torch.randn(4, 3, dtype=torch.complex64), mode).t()
    for _ in range(2):
        assert (waves.real.dtype, waves.real.stride()) == (torch.float32, (2, 6))


def test_results_have_memory_of_their_own(mode: RememberingFakeMode) -> None:
    x = make(torch.randn(2, 6), mode)
    one, two = x + 1, x + 1
    assert one is not two
    assert one.untyped_storage()._cdata != two.untyped_storage()._cdata
    assert (x * 2).requires_grad is False


def test_what_says_more_than_its_sizes_is_asked_again(mode: RememberingFakeMode) -> None:
    x = make(torch.randn(2, 6), mode)
    with counted() as found:
        for dtype in (torch.float32, torch.float64, torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            try:
                assert (make(torch.arange(3), mode) / 2).dtype == dtype
            finally:
                torch.set_default_dtype(torch.float32)
        assert found["aten.div.Tensor"] == 2
        for _ in range(2):
            x.add_(1)
            x.as_strided((2, 2), (1, 1))
        assert found["aten.add_.Tensor"] == found["aten.as_strided.default"] == 2
        first, second = x[x > 0], x[x > 0]
        assert expr(first.shape[0]) != expr(second.shape[0])  # how many is told by the values
    with mode:
        two, three = torch.tensor(2), torch.tensor(3)
        assert (two + 0).item() == 2 and (three + 0).item() == 3


def test_group_norm_s_numbers_are_those_of_its_tensors() -> None:
    """PyTorch's own fake results compare only some of them."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.native_group_norm(x, weight, weight, 0, 4, 1, 2, 1e-5)[0]

    fast = turbotx.optimize(norm, backend="aten")
    assert fast(torch.randn(0, 4), torch.randn(4)).shape == (0, 4)
    for channels in (1, 2, 0):
        given = torch.randn(0, channels), torch.randn(channels)
        with pytest.raises(RuntimeError):
            norm(*given)
        with pytest.raises(CaptureError, match="native_group_norm"):
            fast(*given)

    other = turbotx.optimize(lambda x: torch.native_group_norm(x, None, None, 2, 6, 3, 2, 1e-5))
    other(torch.randn(2, 6, 3))
    with pytest.raises(CaptureError, match="N=2, C=6 and HxW=3 of a tensor of other sizes"):
        other(torch.randn(1, 12, 3))  # of four groups, of which two are in one channel
