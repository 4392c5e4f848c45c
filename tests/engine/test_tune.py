"""Schedules by option and by tuning: what is tried, what is kept, and that results stay right.

In: small kernels, a stand-in for a device, a timer that follows a formula. Out: the schedule that
the formula prefers, remembered for devices of that name.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.compiled_functions import compile_function
from tests.runtime.cuda.stand_in_device import InterpretedDevice, RecordingDevice, bind_to
from turbotx import ir
from turbotx.cli import main
from turbotx.engine.optimize import engine_of
from turbotx.engine.tune import gains, time_launches, tune_program
from turbotx.errors import BuildError, OptionsError
from turbotx.kernels.heuristics import TABLE, heuristics_for
from turbotx.kernels.schedule import Schedule, schedule_for
from turbotx.kernels.tuned import (
    GAIN,
    LARGEST_TILE,
    apply,
    load_tuned,
    make_chooser,
    neighbours,
    parse_tag,
    save_tuned,
    search,
)
from turbotx.options import Options
from turbotx.runtime.cuda.weight_copies import MOST_COPIES, WeightCopies


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(8, 16), nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.up(x) + 1.0)


@pytest.fixture(scope="module")
def row_kernel() -> ir.Kernel:
    return compile_function(lambda x: torch.softmax(x, -1), torch.randn(4, 40)).kernels[0]


@pytest.fixture(scope="module")
def pointwise_kernel() -> ir.Kernel:
    return compile_function(
        lambda x, y: torch.exp(x) + y, torch.randn(4, 40), torch.randn(40)
    ).kernels[0]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TURBOTX_CACHE_DIR", str(tmp_path))


def test_a_device_takes_the_row_of_its_class_or_of_the_one_before() -> None:
    assert heuristics_for("sm_100") == TABLE["sm_100"] != TABLE["sm_90"]
    assert heuristics_for("sm_120") == TABLE["sm_100"]
    assert heuristics_for("sm_89") == TABLE["sm_80"]


def test_newer_devices_take_larger_tiles(pointwise_kernel: ir.Kernel) -> None:
    tiles = [
        make_chooser((), target, {})(pointwise_kernel, 4096, False, False)
        for target in ("sm_90", "sm_100")
    ]
    assert tiles[1].rows * tiles[1].cols == 2 * tiles[0].rows * tiles[0].cols


def test_an_override_goes_before_tuning_and_that_before_heuristics(row_kernel: ir.Kernel) -> None:
    plain = make_chooser((), "sm_90", {})(row_kernel, 40, False, False)
    numbers = heuristics_for("sm_90")
    assert plain == schedule_for(row_kernel, 40, False, False, numbers)
    tuned = {row_kernel.digest(): {"64": "r2w2"}}
    chosen = make_chooser((), "sm_90", tuned)
    assert chosen(row_kernel, 40, False, False) == replace(plain, rows=2, num_warps=2)
    untuned = schedule_for(row_kernel, 300, False, False, numbers)
    assert chosen(row_kernel, 300, False, False) == untuned
    both = make_chooser((("fused_soft*", "w8"), ("other", "w16")), "sm_90", tuned)
    assert both(row_kernel, 40, False, False) == replace(plain, rows=2, num_warps=8)


def test_a_row_longer_than_its_tile_is_walked_along(row_kernel: ir.Kernel) -> None:
    straight = Schedule(1, 1024)
    assert apply(row_kernel, straight, "c256", 1000) == Schedule(1, 256, looped=True)
    assert apply(row_kernel, Schedule(1, 4096, 8, looped=True), "c32768", 20000).looped is False


@pytest.mark.parametrize("tag", ["", "r3", "x", "w0", "r2 w4", "c"])
def test_what_is_no_schedule_is_refused(tag: str) -> None:
    with pytest.raises(OptionsError):
        parse_tag(tag)
    if tag not in ("r3", "w0"):
        with pytest.raises(OptionsError, match="power"):
            Options(schedules={"fused*": tag})
    assert parse_tag("r2c1024w8lx") == {"r": 2, "c": 1024, "w": 8}


def test_neighbours_stay_inside_what_a_device_has(
    row_kernel: ir.Kernel, pointwise_kernel: ir.Kernel
) -> None:
    for kernel in (row_kernel, pointwise_kernel):
        seen, todo = set(), [schedule_for(kernel, 20000, False, False)]
        while todo:
            schedule = todo.pop()
            if schedule not in seen:
                seen.add(schedule)
                todo += neighbours(kernel, schedule, 20000)
        assert len(seen) > 20
        assert all(s.rows * s.cols <= LARGEST_TILE and 1 <= s.num_warps <= 16 for s in seen)
    held = neighbours(row_kernel, Schedule(4, 64, 4), 40)
    assert all(s.cols == 64 and not s.looped for s in held)


def test_the_search_walks_to_the_best_and_ignores_noise(pointwise_kernel: ir.Kernel) -> None:
    def cost(s: Schedule) -> float:
        if s.num_warps > 8:
            return math.inf
        return 10 + abs(math.log2(s.rows / 8)) + abs(math.log2(s.cols / 512))

    def measure(schedules: Any) -> list[float]:
        return [cost(s) for s in schedules]

    def step(s: Schedule) -> list[Schedule]:
        return neighbours(pointwise_kernel, s, 4096)

    best, times = search(Schedule(1, 64, 4), step, measure)
    assert (best.rows, best.cols) == (8, 512)
    assert len(times) < 40
    noisy = search(
        Schedule(1, 64, 4), step, lambda many: [1 - GAIN / 2 * s.rows / 64 for s in many]
    )
    assert noisy[0] == Schedule(1, 64, 4)


def test_what_was_found_is_added_to_what_is_known() -> None:
    assert load_tuned("Some GPU (80 GB)") == {}
    save_tuned("Some GPU (80 GB)", {"a": {"64": "w8"}})
    file = save_tuned("Some GPU (80 GB)", {"a": {"256": "w2"}, "b": {"64": "r2"}})
    assert file.name == "Some-GPU-80-GB.json"
    assert load_tuned("Some GPU (80 GB)") == {"a": {"64": "w8", "256": "w2"}, "b": {"64": "r2"}}
    assert load_tuned("another") == {}


def test_a_tuned_program_is_right_and_takes_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Norm().eval(), torch.randn(2, 100, 8)
    device = RecordingDevice()
    fast = bind_to(device, model, monkeypatch)
    fast(x)
    program = engine_of(fast).variants()[0].program
    timed: list[str] = []

    def timer(device: RecordingDevice, launch: Any, repeat: int) -> float:
        device.log.clear()
        launch()
        queued = [e for e in device.log if e[0] == "launch"]
        if not queued:
            return 1.0  # PyTorch's GEMM
        (entry,) = queued
        timed.append(entry[1])
        rows = -(-200 // entry[2][0])  # from the grid: rows a program
        return abs(rows - 2) + 1.0

    found = tune_program(program, (2, 100), [x], timer)
    (norm,) = [f for f in found if "layer_norm" in f.kernel]
    assert norm.best.startswith("r2")
    assert norm.best_us == 1.0 < norm.before_us
    assert norm.tried == timed.count("fused_add_layer_norm")
    save_tuned(device.describe(), gains(found))
    again, x = bind_to(InterpretedDevice(), model, monkeypatch), x[:, :3]
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x))
    sources = engine_of(again).variants()[0].program.runtime.sources
    assert any("_rows2_" in name for name in sources)


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 192), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(*parts)
        return x + nn.functional.gelu(self.out(mixed.transpose(1, 2).flatten(2)))


def test_gemms_and_attention_are_tuned_and_what_was_found_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = Attend().eval(), torch.randn(1, 3, 32)
    device = RecordingDevice()
    fast = bind_to(device, model, monkeypatch)
    fast(x)

    def timer(device: RecordingDevice, launch: Any, repeat: int) -> float:
        """Prefers the library for the wide GEMM, two parts for the other, small tiles of keys."""
        device.log.clear()
        launch()
        calls, launches = device.names("call"), [e for e in device.log if e[0] == "launch"]
        if calls:
            return 1.0 if not launches else 9.0
        job = next(j for j in device.loaded.values() if j.name == launches[0][1])
        if launches[0][1].startswith("gemm"):
            return 5.0 - launches[0][2][1]
        assert job.name.startswith("attention")
        return float(launches[0][2][0]) + len(launches[0][4])

    found = tune_program(engine_of(fast).variants()[0].program, (1, 3), [x], timer)
    assert {f.kernel.split("_")[0] for f in found} == {"gemm", "attention"}
    best = {f.kernel: (f.before, f.best) for f in found}
    assert best["gemm_float32_192x32_bias"][1] == "cublas"
    assert best["gemm_float32_32x64_bias_gelu_add"][1].endswith("x2l1p1")
    file = save_tuned(device.describe(), gains(found))
    kept = json.loads(file.read_text())
    assert all(tags.keys() == {"16"} for tags in kept.values())
    device = InterpretedDevice()
    again = bind_to(device, model, monkeypatch)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x))
    assert device.names("call").count("addmm") == 1
    assert [e[2][1] for e in device.log if e[0] == "launch" and "gelu" in e[1]] == [2]


class Building(RecordingDevice):
    """Cannot build one kernel: the last of the first ten or more."""

    refused = ""

    def load(self, jobs: Any) -> Any:
        new = [j for j in jobs if j.digest() not in self.loaded]
        if len(new) >= 10 and not self.refused:
            self.refused = new[-1].digest()
        super().load([j for j in new if j.digest() != self.refused])
        if any(j.digest() == self.refused for j in new):
            raise BuildError("Triton refused it")
        return super().load(jobs)[0], len(new)


def test_candidates_are_built_together_before_any_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    device, x = Building(), torch.randn(1, 3, 32)
    fast = bind_to(device, Attend().eval(), monkeypatch)
    fast(x)
    known: list[int] = []

    def timer(device: RecordingDevice, launch: Any, repeat: int) -> float:
        known.append(len(device.loaded))
        return 1.0

    found = tune_program(engine_of(fast).variants()[0].program, (1, 3), [x], timer)
    assert len(found) == 3
    assert len(known) > 15
    assert len(set(known)) == 1
    assert device.refused not in device.loaded
    # It was looked at like the others, and cannot run.
    assert sum(f.tried for f in found) == len(known) + 1


def test_weights_come_from_memory_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbotx.runtime.cuda.weight_copies.LEAST_NBYTES", 100_000)
    device, x = RecordingDevice(), torch.randn(1, 3, 32)
    fast = bind_to(device, Attend().eval(), monkeypatch, gemms="triton")
    fast(x)
    program = engine_of(fast).variants()[0].program
    slots, held = program.executable.slots, program.runtime.placed.held.tensors
    weights = {n: t.data_ptr() for n, t in held.items()}
    seen: list[tuple[int, ...]] = []

    def timer(device: RecordingDevice, launch: Any, repeat: int) -> float:
        device.log.clear()
        for _ in range(3):
            launch()
        read = [e[4][1] for e in device.log if e[0] == "launch" and e[1].startswith("gemm")]
        if len(read) == 3:
            seen.append(tuple(read))
        assert repeat >= 50
        return 1.0

    tune_program(program, (1, 3), [x], timer)
    assert seen
    own = set(weights.values())
    for first, second, third in seen:
        assert first in own
        assert not {second, third} & own
        assert second != third
    # Afterwards the program reads its own weights again.
    (execution,) = program.executions.values()
    assert all(execution.table[slots[n]] == address for n, address in weights.items())


def test_what_pytorch_runs_reads_the_same_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Norm().eval(), torch.randn(2, 100, 8)
    fast = bind_to(RecordingDevice(), model, monkeypatch)
    fast(x)
    program = engine_of(fast).variants()[0].program
    runtime, binding = program.runtime, program.bind((2, 100))
    gemm = next(i for i, x in enumerate(runtime.kernels.assembly.launches) if x.kind == "gemm")
    with torch.no_grad(), program.used(binding, [x]) as (table, state):
        with WeightCopies(runtime, gemm, table, state, binding.sizes) as copies:
            assert copies.count == MOST_COPIES  # of a weight of a few bytes
            states = [copies.turn() for _ in range(MOST_COPIES + 1)]
        (name,) = {n for n in runtime.placed.held.tensors if "up_weight" in n}
        assert states[0].tensors[name] is states[-1].tensors[name] is model.up.weight
        copy = states[1].tensors[name]
        assert copy.data_ptr() != model.up.weight.data_ptr()
        torch.testing.assert_close(copy, model.up.weight)


def test_schedules_by_option_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Norm().eval(), torch.randn(2, 3, 8)
    fast = bind_to(InterpretedDevice(), model, monkeypatch, schedules={"*layer_norm*": "r4w2"})
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    runtime = engine_of(fast).variants()[0].program.runtime
    assert any("_rows4_" in name for name in runtime.sources)


def test_a_time_is_that_of_one_launch_among_many() -> None:
    device = InterpretedDevice()
    launched: list[int] = []
    assert time_launches(device, lambda: launched.append(1)) > 0
    assert len(device.graphs) == 1
    assert len(launched) == 50


def test_without_a_gpu_the_command_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit) as stopped:
        main(["tune", "minilm", "--json"])
    assert stopped.value.code == 3
    assert "PyTorch sees no CUDA device" in json.loads(capsys.readouterr().out)["error"]
