"""The GPU benchmark without a GPU: its plans, how a stage ends, what is kept, a dry run of a stage.

In: benchmarks/gpu.py as a module, and stages that do little. Out: rows, how stages ended, and the
lines of the summary.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton", reason="Triton is for Linux only")
pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def run_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_every_stage_of_every_plan_has_a_name_and_a_limit_of_its_own(gpu: ModuleType) -> None:
    stages = [importlib.import_module(n) for n in importlib.import_module("gpu_plans").MODULES]
    for plan, make in gpu.PLANS.items():
        names = [s.name for group in make() for s in group]
        assert len(names) == len(set(names)), plan
        for group in make():
            for stage in group:
                assert 0 < stage.limit_s <= 180
                assert any(hasattr(m, stage.function) for m in stages), stage.name
                # What is timed has the machine to itself.
                timed = stage.name.startswith(
                    (
                        "latency",
                        "sweep",
                        "shapes",
                        "norms",
                        "stream",
                        "packed",
                        "decode",
                        "int8",
                        "serve",
                    )
                )
                assert len(group) == 1 or not timed, stage.name


def test_the_claims_are_in_the_plan_of_all_figures(gpu: ModuleType) -> None:
    names = {s.name for group in gpu.PLANS["figures"]() for s in group}
    assert {
        "latency/1x40", "latency/32x128", "latency/1x40/compile", "latency/32x128/compile",
        "latency/1x40/compile-reduce-overhead", "latency/32x128/compile-reduce-overhead",
        "stream", "shapes/bert-base", "norms", "functions", "cold", "saved", "tests", "sanitizer",
    } <= names  # fmt: skip


def test_a_part_can_be_listed(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    sys.argv, kept = ["gpu.py", "first", "--list", "--only", "latency/*"], sys.argv
    try:
        assert gpu.main() == 0
    finally:
        sys.argv = kept
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines
    assert all(line.split()[-1].startswith("latency/") for line in lines)


def test_without_a_gpu_it_says_so(gpu: ModuleType, tmp_path: Path) -> None:
    if gpu.describe_device()["name"] != "none":
        pytest.skip("there is a GPU here")
    done = run_process("first", "--out", str(tmp_path / "rows.jsonl"))
    assert done.returncode == 3
    assert "TURBOTX_BENCHMARK_DRY=1" in done.stderr


SCRIPT = """
import json, sys, time
name, out = sys.argv[sys.argv.index("--stage") + 1], sys.argv[sys.argv.index("--out") + 1]
with open(out, "a") as file:
    file.write(json.dumps({"name": name, "us": 1.0, "stage": name}) + "\\n")
if name == "hangs": time.sleep(60)
if name == "fails": raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""


def test_a_stage_that_hangs_or_fails_costs_itself_alone(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    script = tmp_path / "stages.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(gpu, "__file__", str(script))
    limits = {"first": 20.0, "fails": 20.0, "hangs": 1.0, "last": 20.0}
    stage = {name: gpu.Stage(name, limit, "smoke") for name, limit in limits.items()}
    out = tmp_path / "rows.jsonl"
    gpu.append(out, "device", {"device": {"name": "some GPU", "versions": {}}})
    groups = [[stage["first"], stage["fails"]], [stage["hangs"]], [stage["last"]]]
    gpu.run_plan("first", groups, out, 100.0)
    gpu.run_plan("first", [[gpu.Stage("late", 20.0, "smoke")]], out, 5.0)
    rows = gpu.read_rows([out])
    assert {"first", "fails", "hangs", "last"} <= rows.keys()  # what was known before the end
    assert "late" not in rows
    assert rows["stage/fails"]["ended"] == "failed (1)"
    assert "illegal memory access" in rows["stage/fails"]["log"]
    assert rows["stage/hangs"]["ended"] == "out of time"
    assert rows["stage/late"]["ended"] == "skipped for lack of time"
    assert "stage/last" not in rows
    shown = capsys.readouterr().out
    assert "done  last" in shown
    assert "skipped  late" in shown
    kept = gpu.collect(rows)
    assert kept["device"]["name"] == "some GPU"
    assert set(kept["results"]) == {"first", "fails", "hangs", "last"}


def test_the_summary_says_what_is_wrong_and_cut_lines_are_left_out(
    gpu: ModuleType, tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    for name, numbers in (
        ("latency/bert-base/fp16/1x40/turbotx", {"latency_us": 190.5, "row_us": 170.0}),
        ("right/bert-base/fp16", {"holds": True}),
        ("right/gpt2/fp16", {"holds": False, "worst": 3.0}),
        ("kernels/bert-base/fp16/1x40/fold",
         {"sum_us": 9.0, "kernels": {"gemm": {"us": 3.0, "launches": 3.0}}}),
    ):  # fmt: skip
        gpu.append(out, name, numbers)
    with open(out, "a") as file:
        file.write('{"name": "cut o')
    text = "\n".join(gpu.summarize(gpu.read_rows([out])))
    assert "latency_us 190.5, row_us 170.0" in text
    assert "3.00 us x   3.0  gemm" in text
    assert "right: 1, wrong: 1\nright/gpt2/fp16" in text


def test_a_dry_run_goes_through_a_stage_and_builds_what_it_would_load(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    done = run_process(
        "first", "--stage", "right/minilm/bf16", "--out", str(out), TURBOTX_BENCHMARK_DRY="1"
    )
    assert done.returncode == 0, done.stderr
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["captures"] == 1
    assert row["builds"] > 10  # asked of the stand-in, which builds none


def test_it_starts_where_only_the_terminals_packages_are_missing() -> None:
    """PyTorch's GPU images have Triton and transformers, and not always rich."""
    script = (
        "import sys\n"
        "for name in ('rich', 'typer', 'pygments'): sys.modules[name] = None\n"
        "import turbotx; turbotx.optimize, turbotx.explain, turbotx.save\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
