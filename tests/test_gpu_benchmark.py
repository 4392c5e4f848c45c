"""The GPU benchmark without a GPU: what it would measure, and how it spends its budget.

In: benchmarks/gpu.py as a module, and measurements that do nothing. Out: the list of --dry-run,
what is skipped, what is kept of a failure, and the lines of the summary.
"""

from __future__ import annotations

import importlib
import json
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


def dry_run(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str
) -> list[str]:
    monkeypatch.setattr("sys.argv", ["gpu.py", "--dry-run", *more])
    assert gpu.main() == 0
    return capsys.readouterr().out.splitlines()


def test_a_dry_run_lists_every_row_that_is_promised(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = dry_run(gpu, monkeypatch, capsys)
    names = [line.split()[-1] for line in lines[:-1]]
    assert len(names) == len(set(names))
    for model in gpu.MODELS:
        for dtype in ("fp16", "bf16"):
            assert {f"{kind}/{model}/{dtype}" for kind in
                    ("kernels-right", "model-right", "shapes")} <= set(names)  # fmt: skip
            for batch, seq in gpu.SHAPES:
                for engine in gpu.ENGINES[2:]:
                    assert f"latency/{model}/{dtype}/{batch}x{seq}/{engine}" in names
    for engine in gpu.GEMMS:
        assert f"gemms/768x3072/fp16/{engine}" in names
    for engine in gpu.NORMS:
        for name in ("bert-base", "gpt2", "llama"):
            assert {f"norms-right/{name}/fp16/{engine}", f"norms/{name}/fp16/{engine}"} <= {*names}
    for engine in gpu.VARIANTS:
        assert f"latency/bert-base/fp16/1x40/{engine}" in names
    assert (
        "gemms-right/gpt2/fp16/turbotx-triton-pdl" in names and "tuned/bert-base/fp16/1x40" in names
    )
    fits = [line.split()[-1] for line in lines[:-1] if not line.startswith("skipped")]
    # Right before fast, and the claims inside the budget.
    assert fits[1].startswith("kernels-right")
    for needed in ("latency/bert-base/fp16/1x40/turbotx", "stream/bert-base/fp16",
                   "latency/bert-base/fp16/1x40/compile-reduce-overhead",
                   "latency/bert-base/fp16/32x128/turbotx", "lengths/bert-base/fp16",
                   "norms-right/bert-base/fp16/turbotx-fold", "norms/bert-base/fp16/turbotx-fold",
                   "norms/bert-base/fp16/turbotx-store"):  # fmt: skip
        assert needed in fits
    assert "480 s" in lines[-1]


def test_a_part_can_be_asked_for(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = dry_run(gpu, monkeypatch, capsys, "--only", "latency/gpt2/bf16/1x40")
    assert len(lines) == 1 + len(gpu.ENGINES[2:])
    assert len(dry_run(gpu, monkeypatch, capsys, "--only", "*/inductor")) == 1 + 12


def test_without_a_gpu_it_says_so(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 3
    assert "--dry-run" in capsys.readouterr().err


def test_the_budget_skips_what_no_longer_fits_and_keeps_failures(
    gpu: ModuleType, tmp_path: Path
) -> None:
    now = [0.0]

    def take(seconds: float) -> dict[str, object]:
        now[0] += seconds
        return {"us": seconds}

    def fail() -> dict[str, object]:
        raise ValueError("no such kernel")

    one = gpu.Measurement
    planned = [
        one("a", 1, lambda: take(6)), one("b", 5, lambda: take(5)), one("c", 1, fail),
        one("d", 3, lambda: take(1)),
    ]  # fmt: skip
    out = tmp_path / "gpu.json"
    record = gpu.run_all(planned, 10, out, lambda: now[0])
    assert list(record["results"]) == ["a", "d"]
    assert record["skipped"] == ["b"]
    assert "no such kernel" in record["failed"]["c"]
    assert json.loads(out.read_text()) == record
    # A later run on the same device adds what was missing.
    again = gpu.run_all(planned[1:2], 10, out, lambda: now[0])
    assert list(again["results"]) == ["a", "d", "b"]
    lines = gpu.summarize(record)
    assert "failed: c" in lines
    assert lines[-1] == "skipped for lack of time: 1\n  b"


def test_the_summary_compares_and_counts_what_is_wrong(gpu: ModuleType) -> None:
    time = {"latency_us": 200.0, "row_us": 170.0, "peak_nbytes": 1 << 20,
            "streamed_nbytes": 170_000_000}  # fmt: skip
    record = {
        "device": {"name": "some GPU"}, "failed": {}, "skipped": [],
        "results": {
            "device/ceilings": {"copy_gb_per_s": 2000.0},
            "kernels-right/bert-base/fp16": {"holds": True},
            "model-right/gpt2/fp16": {"holds": False},
            "latency/bert-base/fp16/1x40/turbotx": time,
            "gemms/768x3072/fp16/turbotx-triton": {"rows": {"16": {"block_us": 8.0}}},
            "gemms/768x3072/fp16/turbotx-cublas": {"rows": {"16": {"block_us": 9.0}}},
            "latency/bert-base/fp16/1x40/eager": {**time, "latency_us": 800.0, "row_us": 340.0},
        },
    }  # fmt: skip
    text = "\n".join(gpu.summarize(record))
    assert "right: 1 of 2\n  WRONG model-right/gpt2/fp16" in text
    assert "50.0% of the weight-streaming floor" in text
    assert "4.00 x and 2.00 x" in text
    assert "16 tokens: turbotx-triton     8.00 µs, turbotx-cublas     9.00 µs" in text


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
