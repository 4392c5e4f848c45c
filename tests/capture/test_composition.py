"""An optimized model inside of what traces, transforms or watches: the original is what is seen.

In: small optimized modules under torch.export, torch.compile, make_fx, vmap, fake tensors and
modes. Out: graphs of the model's own ops, right for other inputs than those traced with.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import turbotx
from turbotx.capture.composition import left_to_pytorch, turbotx_disabled

X = torch.randn(3, 4)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return torch.tanh(self.a(x)) + self.b(x)


def twin() -> nn.Module:
    return turbotx.optimize(Inner().eval())


def in_place() -> nn.Module:
    return turbotx.optimize(Inner().eval(), in_place=True)


def decorated() -> nn.Module:
    return turbotx.optimize(Inner)().eval()


KINDS = [twin, in_place, decorated]


def whole_of(part: nn.Module) -> nn.Module:
    return nn.Sequential(part, nn.ReLU()).eval()


def close(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("called_before", [False, True])
@torch.no_grad()
def test_inside_another(make, called_before: bool) -> None:
    part = make()
    whole = whole_of(part)
    right = whole(2 * X) if called_before else None
    fast = turbotx.optimize(whole)
    close(fast(X), whole(X))
    close(fast(2 * X), whole(2 * X) if right is None else right)
    assert fast.stats()["captures"] == 1
    part.a.weight.mul_(-1)
    close(fast(X), whole(X))


@pytest.mark.parametrize("make", KINDS)
@torch.no_grad()
def test_export(make) -> None:
    part = make()
    part(X)
    whole = whole_of(part)
    for strict in (False, True):
        made = torch.export.export(whole, (X,), strict=strict)
        assert list(made.state_dict) == list(whole.state_dict())
        assert len(made.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default))
        close(made.module()(2 * X), whole(2 * X))
    assert list(torch.export.export(part, (X,)).state_dict) == list(part.state_dict())


@pytest.mark.parametrize("make", KINDS)
@torch.no_grad()
def test_dynamo(make) -> None:
    part = make()
    part(X)
    whole = whole_of(part)
    for target in (whole, part, lambda x: part(x) * 3):
        torch._dynamo.reset()
        compiled = torch.compile(target, backend="eager", fullgraph=True)
        close(compiled(X), target(X))
        close(compiled(2 * X), target(2 * X))


@pytest.mark.skipif(
    "turbotx" not in torch._dynamo.list_backends(),
    reason="the backend's name is an entry point of the installed package",
)
@pytest.mark.parametrize("make", KINDS)
@torch.no_grad()
def test_dynamo_with_turbotx_around_turbotx(make) -> None:
    part = make()
    part(X)
    right = part(2 * X)
    torch._dynamo.reset()
    whole = torch.compile(whole_of(part), backend="turbotx", fullgraph=True)
    close(whole(2 * X), torch.relu(right))


@pytest.mark.parametrize("make", KINDS)
@torch.no_grad()
def test_tracers(make) -> None:
    part = make()
    right = part(2 * X)
    for made in (
        make_fx(part)(X),
        torch.jit.trace(part, X),
        torch.jit.trace(whole_of(part), X),
        torch.fx.symbolic_trace(part),
        torch.fx.symbolic_trace(whole_of(part)),
    ):
        close(torch.relu(made(2 * X)), torch.relu(right))


@pytest.mark.parametrize("make", KINDS)
def test_transforms(make) -> None:
    part, x = make(), X[None]
    plain = copy.deepcopy(whole_of(part))
    with torch.no_grad():
        right = part(x)
        close(torch.func.vmap(part)(x), right)
        close(torch.func.functionalize(part)(x), right)
        doubled = {k: 2 * v for k, v in part.state_dict().items()}
        other = torch.func.functional_call(part, doubled, (x,))
        assert not torch.allclose(other, right)
        close(part(x), right)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            tangent = torch.autograd.forward_ad.unpack_dual(part(dual)).tangent
        close(tangent, torch.func.jvp(part, (x,), (x,))[1])
    slope = torch.func.grad(lambda v: part(v).sum())(x)
    close(slope, torch.func.grad(lambda v: plain[0](v).sum())(x))
    assert slope.abs().sum() > 0


@pytest.mark.parametrize("make", KINDS)
@torch.no_grad()
def test_fake_tensors_never_reach_kernels(make) -> None:
    part = make()
    part(X)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(X)
        assert isinstance(part(fake), FakeTensor)
    assert isinstance(part(fake), FakeTensor)
    double = turbotx.optimize(lambda x: x * 2)
    double(X)
    assert isinstance(double(fake), FakeTensor)
    close(part(X), part.forward(X))


@torch.no_grad()
def test_subclasses_of_tensors_keep_their_meaning() -> None:
    class Counted(torch.Tensor):
        seen = 0

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            Counted.seen += 1
            return super().__torch_function__(func, types, args, kwargs or {})

    part = twin()
    right = part(X)
    out = part(X.as_subclass(Counted))
    assert type(out) is Counted
    assert Counted.seen > 3
    close(out.as_subclass(torch.Tensor), right)
    close(part(nn.Parameter(X)), right)
    assert part.stats()["captures"] == 1


class Watching(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_modes_that_watch_see_every_op_and_a_default_device_is_none() -> None:
    part = twin()
    part(X)
    with FlopCounterMode(display=False) as counter:
        part(X)
    assert counter.get_total_flops() == 2 * 2 * 3 * 4 * 4
    with Watching() as mode:
        part(X)
    assert "tanh" in mode.seen
    with torch.device("cpu"):
        assert not left_to_pytorch()
        with Watching():
            assert left_to_pytorch()


def test_alone_within_a_thread_and_no_longer() -> None:
    assert not left_to_pytorch()
    with turbotx_disabled():
        with turbotx_disabled():
            assert left_to_pytorch()
        assert left_to_pytorch()
    assert not left_to_pytorch()
