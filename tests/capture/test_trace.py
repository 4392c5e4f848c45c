"""Capture: symbolic sizes, names a user would give, guards, and errors that point at the user."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import turbotx
from tests.graphs import captured
from turbotx.capture.attention_kernels import attention_kernels
from turbotx.capture.trace import capture
from turbotx.engine.optimize import engine_of
from turbotx.errors import CaptureError
from turbotx.ir.fx_nodes import shape


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.register_buffer("positions", torch.arange(16))

    def forward(self, ids, mask=None):
        x = self.table(ids) + self.positions[: ids.shape[1], None]
        return x if mask is None else x * mask[..., None]


IDS = torch.zeros(2, 3, dtype=torch.long)


def test_dims_are_named_as_a_user_would() -> None:
    found = capture(Embed().eval(), (IDS,), {"mask": torch.ones(2, 3)})
    assert found.dims[:2] == ("batch", "seq")
    assert found.input_names == ("ids", "mask")
    assert [str(e) for e in found.input_sizes[0]] == ["batch", "seq"]


def test_parameters_keep_their_names_and_are_shared() -> None:
    model = Embed().eval()
    graph_module = capture(model, (IDS,), {}).graph_module
    assert {n.target for n in graph_module.graph.nodes if n.op == "get_attr"} == {
        "table.weight",
        "positions",
    }
    assert graph_module.get_submodule("table").weight is model.table.weight


class Named(nn.Module):
    """Children called as attributes of a GraphModule are, and as those would be renamed."""

    def __init__(self) -> None:
        super().__init__()
        self.graph, self.code, self.graph_ = (nn.Linear(4, 4) for _ in range(3))
        self.register_buffer("meta", torch.ones(4))

    def forward(self, x):
        return self.graph_(self.graph(x)).relu() + self.code(x) * self.meta


def test_children_may_have_any_name() -> None:
    model, x = Named().eval(), torch.randn(3, 4)
    fast = turbotx.optimize(model, backend="aten")
    torch.testing.assert_close(fast(x), model(x))
    with torch.no_grad():
        model.graph.weight.mul_(2)
        model.meta = torch.zeros(4)
    torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize("first", [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_a_size_of_one_is_symbolic(first) -> None:
    found = captured(lambda x: x.exp(), torch.zeros(first))
    assert [str(e) for e in found.input_sizes[0]] == ["batch", "seq"]


def test_sizes_and_constants_in_the_output() -> None:
    found = captured(lambda x: (x.exp(), x.shape[0] * 2, None, 3), torch.zeros(4))
    assert found.out_spec.num_leaves in (3, 4)


def test_closed_over_tensors_are_constants() -> None:
    table = torch.randn(5)
    found = captured(lambda x: x + table, torch.zeros(5))
    assert any(
        "constants" in str(n.target) for n in found.graph_module.graph.find_nodes(op="get_attr")
    )


def test_guards_hold_and_break() -> None:
    matcher = capture(Embed().eval(), (IDS,), {}).matcher
    assert matcher.match([(5, 16)]) == (5, 16)
    assert matcher.match([(1, 1)]) == (1, 1)
    assert matcher.match([(2, 17)]) is None
    assert "seq <= 16" in matcher.explain([(2, 17)])


def test_equal_dims_must_stay_equal() -> None:
    matcher = captured(lambda x, y: x @ y, torch.zeros(2, 3), torch.zeros(3, 4)).matcher
    assert matcher.match([(5, 6), (6, 7)]) is not None
    assert matcher.match([(5, 6), (5, 7)]) is None


def test_dims_that_a_view_makes_equal_are_one() -> None:
    weight = torch.eye(8)

    def heads(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        length, batch, _ = q.shape
        q = (q @ weight).reshape(length, batch * 2, 4).transpose(0, 1)
        return q @ (k @ weight).reshape(k.shape[0], batch * 2, 4).permute(1, 2, 0)

    fast = turbotx.optimize(heads)
    for batch in (3, 1):
        q, k = torch.randn(5, batch, 8), torch.randn(4, batch, 8)
        torch.testing.assert_close(fast(q, k), heads(q, k))
    (compiled,) = engine_of(fast).variants()
    assert compiled.captured.dims == ("batch", "seq", "k_d0")
    with pytest.raises(turbotx.TurbotxError):
        fast(torch.randn(5, 3, 8), torch.randn(4, 2, 8))


def test_shapes_follow_the_named_dims() -> None:
    graph = captured(lambda x: x.reshape(-1), torch.zeros(3, 4)).graph_module.graph
    assert str(shape(next(n for n in graph.nodes if "view" in n.name))) == "(batch*seq,)"


def test_a_failure_names_the_users_line() -> None:
    def wrong(x):
        return x + torch.zeros(7, 9)  # shown to the user

    with pytest.raises(CaptureError, match="shown to the user"):
        captured(wrong, torch.zeros(2, 3))


def test_outputs_that_are_no_tensors_say_so() -> None:
    with pytest.raises(CaptureError, match="its output holds a object"):
        captured(lambda x: object(), torch.zeros(2))


class Caching(nn.Module):
    """Keeps the places of its longest call, as models with position biases do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", None, persistent=False)
        self.names: list[str] = []

    def forward(self, x):
        if self.places is None or len(self.places) < x.shape[1]:
            self.register_buffer("places", torch.arange(x.shape[1]).float(), persistent=False)
        self.last = x.sum()
        return x + self.places[: x.shape[1]]


def test_a_call_leaves_in_the_model_what_eager_leaves() -> None:
    model, fresh = Caching().eval(), Caching()
    fast, x = turbotx.optimize(model), torch.randn(2, 5)
    torch.testing.assert_close(fast(x), fresh(x))
    torch.testing.assert_close(model.places, fresh.places)
    torch.testing.assert_close(model.last, fresh.last)
    torch.testing.assert_close(model(x), fresh(x))
    y = torch.randn(3, 9)
    torch.testing.assert_close(fast(y), fresh(y))
    torch.testing.assert_close(model.last, fresh.last)


def test_a_model_that_changes_its_buffer_is_refused() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count.add_(1)
            return x + self.count

    with pytest.raises(CaptureError, match=r"its own tensor 'count' in place, at .*test_trace.py:"):
        capture(Counter().eval(), (torch.zeros(3),), {})


def test_an_input_that_is_changed_in_place_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"an input 'x' in place, at .*test_trace.py:"):
        captured(lambda x: x.add_(1), torch.zeros(3))


def test_numbers_made_by_the_model_are_numbers_and_closed_over_tensors_stay_tensors() -> None:
    own, x = torch.tensor(0.5), torch.randn(3, 4)
    found = captured(lambda x: x * own / torch.sqrt(torch.tensor(2.0)), x)
    targets = [n.target for n in found.graph_module.graph.nodes]
    assert targets.count(torch.ops.aten.scalar_tensor.default) == 1
    own.fill_(3.0)
    torch.testing.assert_close(found.graph_module(x)[0], x * 3.0 / 2.0**0.5)


def next_and_own(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x[:, 1:], (0, 0, 0, 1)) + 2 * x


@pytest.mark.parametrize("first", [1, 2, 5])
def test_a_part_of_a_length_may_be_one_or_empty(first: int) -> None:
    fast = turbotx.optimize(next_and_own, backend="aten")
    for length in (first, 1, 2, 9):
        x = torch.randn(3, length, 4)
        torch.testing.assert_close(fast(x), next_and_own(x))
    assert fast.stats()["captures"] == 1


def last_but_for_one_token(x: torch.Tensor) -> torch.Tensor:
    rest = x[:, 1:]
    return rest * 3 if rest.shape[1] == 1 else rest


def test_a_model_may_tell_one_from_others() -> None:
    fast = turbotx.optimize(last_but_for_one_token, backend="aten")
    for length in (5, 2, 1, 9):
        x = torch.randn(3, length, 4)
        torch.testing.assert_close(fast(x), last_but_for_one_token(x))


def test_a_model_made_in_inference_mode_is_refused_by_name() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4)).eval()
    with pytest.raises(CaptureError, match=r"'0\.weight' was made under torch\.inference_mode"):
        turbotx.optimize(model)(torch.randn(2, 4))


@pytest.mark.parametrize("first", [1, 5])
def test_slices_from_the_end_and_of_what_is_too_short(first: int) -> None:
    table = torch.randn(40, 4)
    cases = (
        lambda x: x[:, 2:] * 2,
        lambda x: x[:, -3:] * 2,
        lambda x: x[:, -x.shape[1] // 2 :] * 2,
        lambda x: x + table[-x.shape[1] :],
        lambda x: x + table[30 - x.shape[1]] + table[-x.shape[1]],
    )
    for case in cases:
        fast = turbotx.optimize(case)
        for length in (first, 1, 2, 3, 9):
            x = torch.randn(3, length, 4)
            torch.testing.assert_close(fast(x), case(x))


def test_sizes_of_1_and_0_that_the_call_spells_out() -> None:
    """Tracing them as any size does not work; then they are what they are."""

    def norm(x):
        return torch.nn.functional.layer_norm(x, (1, 3))

    def sums(x):
        return x.view(0, 4).softmax(-1).sum(0)

    for function, x in ((norm, torch.randn(2, 1, 3)), (sums, torch.randn(0, 4))):
        fast = turbotx.optimize(function)
        torch.testing.assert_close(fast(x), function(x))
    with pytest.raises(CaptureError, match="cannot capture"):
        fast(torch.randn(3, 4))


def test_sizes_that_are_a_tables_keys_beside_a_size_that_a_weight_fixes() -> None:
    weight, factors = torch.randn(3, 1), {2: 0.5, 4: 3.0, 5: -1.0}

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, weight) * factors[x.shape[1]]

    fast = turbotx.optimize(scaled)
    for batch, seq in ((3, 4), (1, 2), (6, 5), (2, 4)):
        x = torch.randn(batch, seq, 1)
        torch.testing.assert_close(fast(x), scaled(x))
    assert fast.stats()["captures"] == 3, "one a length"


@pytest.mark.parametrize("dims", [None, 1, (0, 2)], ids=str)
def test_a_squeeze_drops_what_is_1_and_keeps_what_is_not(dims) -> None:
    """Which of both, tracing has to decide; another size is another trace."""

    def squeezed(x):
        return (x.squeeze() if dims is None else x.squeeze(dims)) * 2

    fast = turbotx.optimize(squeezed)
    for size in ((5, 1, 3), (1, 1, 1), (4, 3, 2), (1, 2, 3)):
        x = torch.randn(size)
        assert fast(x).shape == squeezed(x).shape
        torch.testing.assert_close(fast(x), squeezed(x))


chosen: list[str] = []


class Attending(nn.Module):
    """Notes how attention's kernel is chosen; `view` asks for the fused kernels' layout."""

    def __init__(self, view: bool = False, device: str = "cpu") -> None:
        super().__init__()
        self.view = view
        self.shift = nn.Parameter(torch.zeros(16, device=device))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        fused = torch.backends.cuda.mem_efficient_sdp_enabled()
        chosen.append("fused" if fused else "plain")
        q = (x + self.shift).unflatten(-1, (2, -1)).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask).transpose(1, 2)
        return mixed.view(x.shape) if self.view else mixed.flatten(2)


@pytest.mark.parametrize("view", [False, True])
def test_attention_on_a_gpu_is_traced_whole_whatever_kernel_is_chosen(
    view: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = attention_kernels([torch.empty(0), SimpleNamespace(is_cuda=True)])
    assert attention_kernels([torch.empty(0)]) == on_gpu[1:]
    monkeypatch.setattr("turbotx.capture.trace.attention_kernels", lambda tensors: on_gpu)
    chosen.clear()
    model = Attending(view)
    captured = capture(model, (torch.randn(2, 7, 16), torch.ones(2, 1, 7, 7).bool()), {})
    targets = [str(n.target) for n in captured.graph_module.graph.nodes]
    assert targets.count("aten.scaled_dot_product_attention.default") == 1
    assert not captured.guards
    (appended,) = captured.effects  # of the trace that succeeded
    assert appended.leaves == ("fused" if view else "plain",) and not chosen
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch is built without CUDA")
def test_attention_over_tensors_of_a_gpu_is_traced_by_the_plain_kernel() -> None:
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        x = torch.empty(2, 7, 16, device="cuda")
        mask = torch.empty(2, 1, 7, 7, device="cuda", dtype=torch.bool)
        model = Attending(device="cuda")
    chosen.clear()
    captured = capture(model, (x, mask), {})
    (appended,) = captured.effects
    assert appended.leaves == ("plain",) and not chosen and not captured.guards
