"""What cannot be captured is refused by name, and the screen stays clean."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import turbotx
from turbotx.capture.quiet import quiet_torch
from turbotx.engine import pipeline
from turbotx.errors import CaptureError, CompileError, InputError, TurbotxError


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(1, 2))])
def test_torchscript_is_refused_and_the_model_runs_on(make: Any) -> None:
    part = make(nn.Sequential(nn.Linear(2, 2)).eval())
    model = nn.Sequential(nn.Linear(2, 2), part).eval()
    right = model(torch.ones(1, 2))
    with pytest.raises(CaptureError, match="its part '1' is TorchScript"):
        turbotx.optimize(model)(torch.ones(1, 2))
    assert torch.equal(model(torch.ones(1, 2)), right)
    with pytest.raises(TurbotxError, match="is TorchScript"):
        turbotx.optimize(part)(torch.ones(1, 2))


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_modules_are_refused_before_their_first_call() -> None:
    model, x = nn.Sequential(nn.LazyLinear(3), nn.LazyLinear(2)).eval(), torch.ones(2, 4)
    fast = turbotx.optimize(model)
    with pytest.raises(CaptureError, match="LazyLinear at '0' before its first call"):
        fast(x)
    with pytest.raises(CaptureError, match="LazyLinear before its first call"):
        turbotx.optimize(model[0])
    right = model(x)
    torch.testing.assert_close(fast(x), right)


@pytest.mark.filterwarnings("ignore")
def test_packed_quantised_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    packed = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(CaptureError, match="packed by PyTorch"):
        turbotx.optimize(packed)(torch.ones(1, 4))


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_input_is_refused() -> None:
    x = torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.quint8)
    with pytest.raises(InputError, match="quint8"):
        turbotx.optimize(lambda x: x.dequantize())(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda x: torch.nested.nested_tensor([x, x[:1]]), "a nested tensor"),
        (lambda x: x.to_sparse(), "layout torch.sparse_coo"),
    ],
)
def test_inputs_without_strides_are_refused(make: Any, kind: str) -> None:
    fast, x = turbotx.optimize(lambda x: x * 2), torch.ones(2, 3)
    with pytest.raises(InputError, match=f"an input (is|has) {kind}"):
        fast(make(x))
    assert torch.equal(fast(x), x * 2)
    with pytest.raises(InputError, match=f"an input (is|has) {kind}"):
        fast(make(x))


@pytest.mark.parametrize(
    "model",
    [
        lambda x: x.nonzero(),
        lambda x: x[x > 0] * 2,
        lambda x: x * x.sum().item(),
        lambda x: x[: int(x.sum())],
        lambda x: (x, x.sum().item()),
    ],
)
def test_numbers_that_tensors_hold_are_refused(
    model: Any, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)  # another test's handler is closed
    with pytest.raises(CaptureError, match=r"depends on values|number that a tensor holds"):
        turbotx.optimize(model)(torch.ones(2, 2))
    assert capfd.readouterr() == ("", "")


def test_a_trace_that_is_tried_again_prints_nothing(
    capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def model(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, y]) @ torch.ones(3, 3)

    with pytest.raises(TurbotxError):  # eager's own error
        turbotx.optimize(model)(torch.ones(2, 4), torch.ones(1, 4))
    assert capfd.readouterr() == ("", "")


def test_other_threads_and_later_records_are_heard(caplog: Any) -> None:
    logger = logging.getLogger("torch.export")
    before = list(logger.filters)
    with quiet_torch():
        logger.error("mine")
        other = threading.Thread(target=logger.error, args=("another's",))
        other.start()
        other.join()
        with quiet_torch():
            pass
        logger.error("still mine")
    logger.error("later")
    heard = [r.message for r in caplog.records if r.name == "torch.export"]
    assert heard == ["another's", "later"] and logger.filters == before


def test_torch_logs_keeps_them(monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setenv("TORCH_LOGS", "dynamic")
    with quiet_torch():
        logging.getLogger("torch.export").error("asked for")
    assert "asked for" in caplog.text


def test_an_unexpected_error_names_model_stage_and_node(monkeypatch: Any) -> None:
    def broken(node: Any, hoisted: Any = None) -> str:
        raise KeyError(node.name)

    monkeypatch.setattr("turbotx.passes.partition.kind_of", broken)
    model = nn.Sequential(nn.GELU(), nn.Tanh()).eval()
    with pytest.raises(
        CompileError, match=r"failed on Sequential in partition .* at input_1"
    ) as raised:
        turbotx.optimize(model)(torch.ones(2, 2))
    assert isinstance(raised.value.__cause__, KeyError)


def test_turbotx_s_own_errors_and_lack_of_memory_pass(monkeypatch: Any) -> None:
    for error in (InputError("mine"), MemoryError()):

        def failing(*args: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(pipeline, "partition", failing)
        with pytest.raises(type(error)) as raised:
            turbotx.optimize(lambda x: x * 2)(torch.ones(2))
        assert raised.value is error


W = torch.randn(9, 12)


@pytest.mark.parametrize(
    "model",
    [
        lambda x: F.linear(x, W[:, : x.shape[-1]]) * 2,
        lambda x: F.linear(x[..., :12], W[: x.shape[0]]),
        lambda x: x.diagonal().reshape(-1) * 2,
        lambda x: torch.as_strided(x, x.shape, x.stride()) + 1,
        lambda x: torch.take_along_dim(x, torch.ones(x.shape[0], 2, dtype=torch.int64), 1),
    ],
)
def test_programs_that_were_refused(model: Any) -> None:
    fast = turbotx.optimize(model)
    for shape in ((3, 12), (5, 12), (5, 12)):
        x = torch.randn(*shape)
        torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize("slice_first", [True, False])
def test_inputs_that_are_slices(slice_first: bool) -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        v = x + 1
        v[1:] *= 3
        return v

    fast = turbotx.optimize(model)
    calls = [
        torch.randn(4, 20)[:, 5:10],
        torch.randn(7, 3).t(),
        torch.randn(5, 6),
        torch.ones(9)[3:],
    ]
    for x in calls if slice_first else calls[::-1]:
        torch.testing.assert_close(fast(x), model(x))


def test_raw_strides_of_a_transposed_input() -> None:
    fast = turbotx.optimize(lambda x: (x.as_strided((x.shape[0],), (1,)), x.t(), x.t()[1:]))
    for x in (torch.randn(4, 3).t(), torch.randn(3, 4), torch.randn(5, 2).t()):
        for mine, own in zip(
            fast(x), (x.as_strided((len(x),), (1,)), x.t(), x.t()[1:]), strict=True
        ):
            torch.testing.assert_close(mine, own)


def test_negative_and_conjugate_bits() -> None:
    fast = turbotx.optimize(lambda x: x * 2)
    for x in (torch.randn(4), torch._neg_view(torch.randn(4)), torch.randn(4)):
        torch.testing.assert_close(fast(x), x * 2)
    parts = turbotx.optimize(lambda x: torch.view_as_real(x.resolve_conj()) + x.imag.sum())
    for z in (torch.randn(3, dtype=torch.complex64).conj(), torch.randn(3, dtype=torch.complex64)):
        right = torch.view_as_real(z.resolve_conj()) + z.imag.sum()
        torch.testing.assert_close(parts(z), right)


def test_parts_of_split_parameters_are_computed_once() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            one, two = self.table.chunk(2)
            p, q = (self.table.sum(1) * 2).split(3)
            return F.linear(x, one + two, p) + q

    net = Net().eval().requires_grad_(False)
    fast = turbotx.optimize(net)
    for n in (2, 5):
        x = torch.randn(n, 4)
        torch.testing.assert_close(fast(x), net(x))


def test_sizes_by_which_small_ones_cannot_be_divided() -> None:
    """At lengths below 16 a size divides by zero, where nobody calls it."""

    def model(x: torch.Tensor) -> torch.Tensor:
        parts = x.shape[1] // 8
        return x[:, : x.shape[1] // parts * parts].reshape(x.shape[0], parts, -1, 4).exp() @ W[:4]

    fast = turbotx.optimize(model)
    for n in (16, 24, 40):
        x = torch.randn(2, n, 4)
        torch.testing.assert_close(fast(x), model(x))


def test_a_default_dtype_that_the_model_sets_is_refused() -> None:
    def mixed(x):
        torch.set_default_dtype(torch.float64)
        y = torch.ones(3) / 3
        torch.set_default_dtype(torch.float32)
        return x + y

    with pytest.raises(
        CaptureError, match=r"(?s)mixed at .*default dtype from torch.float32 to .*64"
    ):
        turbotx.optimize(mixed)(torch.arange(3))
    assert torch.get_default_dtype() is torch.float32
