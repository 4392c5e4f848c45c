"""Norms folded into GEMMs, in whole programs: launches, results, parameters that change.

In: small BERT, GPT-2, Llama and hand-made models as GPU programs in Triton's interpreter.
Out: launches a layer, errors against float64, which of the two programs serves a shape.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is for Linux only")

import turbotx
from tests.models import assert_as_exact_as_eager, in_double, token_inputs
from tests.runtime.cuda.stand_in_device import InterpretedDevice, RecordingDevice, bind_to
from turbotx.engine.optimize import engine_of
from turbotx.engine.tune import gains, tune_call, tune_norms
from turbotx.errors import DeviceError, OptionsError
from turbotx.kernels.tuned import save_tuned

transformers = pytest.importorskip("transformers")


def tiny(name: str, layers: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A model of several layers, whose norms do more than their first values."""
    torch.manual_seed(0)
    names = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    if name == "gpt2":
        names = {"n_embd": 32, "n_layer": layers, "n_head": 2, "n_inner": 48, "n_positions": 32}
    names |= {"intermediate_size": 48} if name != "gpt2" else {"bos_token_id": 1, "eos_token_id": 2}
    kind = {"bert": "Bert", "gpt2": "GPT2", "llama": "Llama"}[name]
    config = getattr(transformers, f"{kind}Config")(vocab_size=160, use_cache=False, **names)
    model = getattr(transformers, f"{kind}Model")(config).to(dtype).eval()
    for path, p in model.named_parameters():
        if "norm" in path.lower() or ".ln_" in path:
            p.data = (p.data + 0.5 * torch.randn_like(p)).detach()
    return model


def check(fast: Any, model: torch.nn.Module, batch: int, seq: int) -> None:
    inputs = token_inputs(batch, seq)
    with torch.no_grad():
        eager, exact = model(**inputs), in_double(model)(**copy.deepcopy(inputs))
    assert_as_exact_as_eager(fast(**inputs), eager, exact)


def launches_a_layer(compiled: Any) -> int:
    kinds = [x.kind for x in compiled.assembly.launches]
    first = kinds.index("attention")
    return kinds.index("attention", first + 1) - first


@pytest.mark.parametrize(
    ("name", "dtype", "launches"),
    [("bert", torch.float16, [7, 5]), ("gpt2", torch.float16, [7, 5]),
     ("llama", torch.bfloat16, [8, 6])],
    ids=str,
)  # fmt: skip
def test_shapes_that_alternate_between_two_programs(
    name: str, dtype: torch.dtype, launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbotx.kernels.gemm_heuristics.MOST_FOLDED", 16)
    model, device = tiny(name, 2, dtype), InterpretedDevice()
    options = {"schedules": {"gemm_*": "x2"}} if name == "gpt2" else {}
    fast = bind_to(device, model, monkeypatch, **options)
    check(fast, model, 2, 3)
    (compiled,) = engine_of(fast).variants()
    assert [launches_a_layer(x) for x in compiled.specializations] == launches
    served = [p.token_range.buckets for p in compiled.programs]
    assert served[1] == {16} and 16 not in served[0]
    built = fast.stats()["kernel_builds"]
    shapes = [(1, 1), (3, 7), (2, 3), (3, 7), (1, 1), (2, 3), (3, 7)]  # twice: captured, replayed
    for batch, seq in shapes:
        before = len(device.names("launch"))
        check(fast, model, batch, seq)
        ran = device.names("launch")[before:]
        norms = [n for n in ran if n.startswith("gemm_") and "_norm" in n]
        assert bool(norms) == (batch * seq <= 16) or not ran
    assert fast.stats()["graph_captures"] == 3 and fast.stats()["captures"] == 1
    assert fast.stats()["kernel_builds"] == built


class Chain(torch.nn.Module):
    """GEMMs around norms of several kinds; `last` makes what only a vocabulary reads."""

    def __init__(self, width: int, norm: str = "layer", bias: bool = True) -> None:
        super().__init__()
        linear = torch.nn.Linear
        self.into = linear(width, width, bias=bias)
        self.up, self.down = linear(width, 24, bias=bias), linear(24, width, bias=bias)
        kind = {"layer": torch.nn.LayerNorm, "rms": torch.nn.RMSNorm}[norm]
        self.first, self.second = (kind(width, eps=1e-5) for _ in range(2))
        self.last = linear(width, 9, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x + self.into(x))
        h = self.second(h + self.down(F.gelu(self.up(h))))
        return self.last(h)


def randomise(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.5)


def compare(fast: Any, model: torch.nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        assert_as_exact_as_eager(fast(x), model(x), in_double(model)(x.double()))


@pytest.mark.parametrize(("width", "norm", "bias"), [(20, "layer", False), (33, "rms", True)])
@pytest.mark.parametrize(
    ("dtype", "mean"), [(torch.float16, 100.0), (torch.bfloat16, 30.0), (torch.float32, 1e4)],
    ids=str,
)  # fmt: skip
def test_large_means_odd_widths_and_no_biases(
    width: int, norm: str, bias: bool, dtype: torch.dtype, mean: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    torch.manual_seed(1)
    model = Chain(width, norm, bias).to(dtype).eval()
    randomise(model)
    fast = bind_to(InterpretedDevice(), model, monkeypatch, norms="fold", cuda_graphs=False)
    for shape in ((1, 1), (2, 9), (0, 3)):
        compare(fast, model, (torch.randn(*shape, width) + mean).to(dtype))
    # A call without rows has a capture of its own, which computes nothing.
    (folded,), _ = (c.specializations for c in engine_of(fast).variants())
    assert [x.kind for x in folded.assembly.launches] == ["gemm"] * 4


def test_parameters_that_change_are_folded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Chain(20).half().eval()
    model.up.weight = torch.nn.Parameter(torch.randn(24, 20).half() / 5)
    model.down.weight = torch.nn.Parameter(model.up.weight.data.t())  # stored the other way
    fast = bind_to(InterpretedDevice(), model, monkeypatch, norms="fold")
    x = torch.randn(2, 3, 20).half()
    for _ in range(3):
        compare(fast, model, x)
    with torch.no_grad():
        model.first.weight.mul_(3.0)  # in place: one folded weight, and the residual's gamma
    compare(fast, model, x)
    model.second.bias = torch.nn.Parameter(torch.randn(20).half())  # replaced
    compare(fast, model, x)
    model.load_state_dict({k: torch.randn_like(v) / 4 for k, v in model.state_dict().items()})
    compare(fast, model, x)


def test_tied_weights_and_no_gamma(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Chain(24).eval()
    model.up.weight = model.down.weight = model.into.weight
    model.first = torch.nn.LayerNorm(24, elementwise_affine=False)
    fast = bind_to(InterpretedDevice(), model, monkeypatch, norms="fold", cuda_graphs=False)
    compare(fast, model, torch.randn(3, 5, 24))


class Merge(torch.nn.Module):
    """Heads merged, which no strides express: the GEMM before the norm reads a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.next = torch.nn.Linear(24, 24), torch.nn.Linear(24, 24)
        self.norm = torch.nn.LayerNorm(24)

    def forward(self, heads: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        rows = self.into(heads.transpose(1, 2).flatten(2)) + residual
        return self.next(self.norm(rows))


def test_a_gemm_that_reads_a_copy_leaves_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Merge().eval()
    randomise(model)
    fast = bind_to(InterpretedDevice(), model, monkeypatch, norms="fold", cuda_graphs=False)
    inputs = torch.randn(2, 3, 5, 8), torch.randn(2, 5, 24)
    with torch.no_grad():
        ours, own = fast(*inputs), model(*inputs)
        assert_as_exact_as_eager(ours, own, in_double(model)(*(x.double() for x in inputs)))
    (compiled,) = engine_of(fast).variants()
    gemms = [x.gemm for x in compiled.assembly.launches if x.kind == "gemm"]
    assert [x.stats for x in gemms] == [True, False] and gemms[1].norm is not None


class Read(torch.nn.Module):
    """A norm whose result others read too."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.norm = how, torch.nn.LayerNorm(16)
        self.into, self.next = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
        self.words = torch.nn.Linear(16, 16 * 17)

    def forward(self, x: torch.Tensor) -> Any:
        rows = x + self.into(x)
        h = self.norm(rows)
        after = {
            "output": lambda: (self.next(h), h),
            "pooled": lambda: self.next(h[:, 0]),
            "kernel": lambda: self.next(h) + h.mean(-1, keepdim=True),
            "words": lambda: self.words(h),
            "rows": lambda: (self.next(h) + rows, rows),
        }
        return after[self.how]()


@pytest.mark.parametrize("how", ["output", "pooled", "kernel", "words", "rows"])
def test_what_others_read_is_stored(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Read(how).eval()
    randomise(model)
    fast = bind_to(InterpretedDevice(), model, monkeypatch, norms="fold", cuda_graphs=False)
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        ours, own, exact = fast(x), model(x), in_double(model)(x.double())
    assert_as_exact_as_eager(ours, own, exact)
    (compiled,) = engine_of(fast).variants()
    folds = [x for x in compiled.assembly.launches if x.kind == "gemm" and x.gemm.folds]
    assert len(folds) == (2 if how == "rows" else 0)


def test_a_callers_own_capture_wants_the_program_of_its_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("turbotx.kernels.gemm_heuristics.MOST_FOLDED", 16)
    device = RecordingDevice()
    fast = bind_to(device, Chain(16).half().eval(), monkeypatch)
    few, many = torch.randn(2, 3, 16).half(), torch.randn(5, 7, 16).half()
    fast(few)
    device.users_capture = True
    fast(torch.randn(4, 4, 16).half())  # other sizes of the same program
    with pytest.raises(DeviceError, match="for these sizes has not run yet"):
        fast(many)
    device.users_capture = False
    fast(many)
    device.users_capture = True
    fast(many)


def test_the_report_is_of_the_program_that_serves_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbotx.kernels.gemm_heuristics.MOST_FOLDED", 16)
    model = tiny("bert", 2, torch.float16)
    fast = bind_to(InterpretedDevice(), model, monkeypatch, cuda_graphs=False)
    report = turbotx.explain(fast, **token_inputs(2, 3))
    larger = report.at(batch=5, seq=7)
    assert len(report.launches) == len(larger.launches) - 3  # its last one stays
    assert [x.name for x in larger.at(batch=2, seq=3).launches] == [x.name for x in report.launches]
    assert "layer_norm" in str(report) and report.to_html()
    numerics = report.numerics(fast, **token_inputs(2, 3))
    assert numerics.holds and len(numerics.launches) >= len(report.launches)


def test_options_that_contradict_each_other() -> None:
    for other in ({"gemms": "cublas"}, {"epilogues": False}):
        with pytest.raises(OptionsError, match="leave out one"):
            turbotx.optimize(torch.nn.Linear(2, 2), norms="fold", **other)


def test_tuning_times_both_programs_and_keeps_the_faster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TURBOTX_CACHE_DIR", str(tmp_path))
    model, x, device = Chain(16).half().eval(), torch.randn(2, 3, 16).half(), RecordingDevice()
    fast = bind_to(device, model, monkeypatch, cuda_graphs=False)
    fast(x)
    (compiled,) = engine_of(fast).variants()
    assert compiled.at((2, 3)).program is compiled.programs[1]

    def timer(device: RecordingDevice, run: Any, repeat: int) -> float:
        device.log.clear()
        run()
        return 1.0 if any(n.startswith("fused") for n in device.names("launch")) else 2.0

    tiles = {f.kernel for f in tune_call(compiled, (2, 3), [x], lambda device, run, repeat: 1.0)}
    assert {"fused_add_layer_norm", "gemm_float16_9x16_layer_norm_bias"} <= tiles
    (found,) = tune_norms(compiled, (2, 3), [x], timer)
    assert (found.kernel, found.length, found.before, found.best) == (
        "norms", 16, "folded", "stored",
    )  # fmt: skip
    save_tuned(device.describe(), gains([found]))
    again = bind_to(RecordingDevice(), model, monkeypatch, cuda_graphs=False)
    again(x)
    (compiled,) = engine_of(again).variants()
    assert compiled.at((2, 3)).program is compiled.programs[0]
    assert compiled.at((4, 5)).program is compiled.programs[1]  # another bucket
    asked = bind_to(RecordingDevice(), model, monkeypatch, schedules={"gemm_*": "cublas"})
    asked(x)
    assert len(engine_of(asked).variants()[0].programs) == 1
