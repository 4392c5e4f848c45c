"""Everything that turbotx claims of a GPU, measured on the one that is here.

In: the name of a plan, a list of stages. Each stage is a process of its own with a limit, so that a
crash or a hang costs that stage alone; every row is appended to a file as soon as it is known. Out:
OUT.jsonl, and a table. Runs from a checkout::

    python benchmarks/gpu.py figures --out /tmp/rows.jsonl --keep   # and into results/gpu.json
    python benchmarks/gpu.py first --only 'latency*'
    TURBOTX_BENCHMARK_DRY=1 python benchmarks/gpu.py figures    # needs no GPU: does every line run?
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from gpu_plans import DRY, NEW_FOLDER, PLANS, Stage  # noqa: E402
from gpu_rows import collect, read_rows, summarize  # noqa: E402

RESULTS = HERE / "results" / "gpu.json"
# Limits are of a machine with a GPU; a dry run has whatever processor there is.
SLOWER = 10 if DRY else 1
# What a stage's process gets to end by itself after its limit.
GRACE_S = 5


def run_stage(plan: str, out: Path, stage: Stage, limit_s: float) -> tuple[str, float]:
    """Run one stage as a process; return how it ended and its seconds."""
    begin = time.perf_counter()
    command = [
        *stage.wrapper,
        sys.executable,
        __file__,
        plan,
        "--stage",
        stage.name,
        "--out",
        str(out),
    ]
    log = out.with_name(f"{out.stem}-{stage.name.replace('/', '-')}.log")
    environment = {**os.environ, **stage.environment}
    new = [name for name, value in stage.environment.items() if value == NEW_FOLDER]
    environment |= {name: tempfile.mkdtemp() for name in new}
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = 124
            stop(process)
    ended = {0: "done", 124: "out of time"}.get(code, f"failed ({code})")
    if code:
        tail = log.read_text()[-1500:]
        append(out, f"stage/{stage.name}", {"ended": ended, "log": tail})
    return ended, time.perf_counter() - begin


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and whatever it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue


def run_plan(plan: str, groups: list[list[Stage]], out: Path, limit_s: float) -> None:
    """Run groups one after another, the stages of a group at the same time, within a limit."""
    begin = time.perf_counter()
    for group in groups:
        left = limit_s - (time.perf_counter() - begin)
        fits = [s for s in group if left >= min(s.limit_s, 10)]
        for stage in group:
            if stage not in fits:
                append(out, f"stage/{stage.name}", {"ended": "skipped for lack of time"})
                print(f"         skipped  {stage.name}", flush=True)
        with ThreadPoolExecutor(max(1, len(fits))) as pool:
            limits = [min(s.limit_s * SLOWER, left) for s in fits]
            ended = pool.map(partial(run_stage, plan, out), fits, limits)
            for stage, (how, taken) in zip(fits, ended, strict=True):
                at = time.perf_counter() - begin
                print(f"{at:6.1f} s {taken:6.1f} s  {how}  {stage.name}", flush=True)


def append(out: Path, name: str, numbers: dict[str, Any]) -> None:
    """Keep one row, whole and at once, beside what other processes write."""
    line = json.dumps({"name": name, **numbers}) + "\n"
    with open(out, "a") as file:
        file.write(line)


def do_stage(plan: str, name: str, out: Path) -> int:
    """What a stage's process does."""
    stage = next(s for group in PLANS[plan]() for s in group if s.name == name)
    device = None
    if DRY:
        import gpu_standin

        device = gpu_standin.start("sm_90")

    def emit(row: str, numbers: dict[str, Any]) -> None:
        append(out, row, {**numbers, "stage": stage.name})

    try:
        stage.run(emit)
    except Exception:
        # Nothing is asked of the device any more: after an error it may not answer.
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    if device is not None and "TURBOTX_BENCHMARK_BUILD" in os.environ:
        from turbotx.kernels.triton.compiler import build

        jobs = list(device.jobs.values())
        new = sum(not built.cached for built in build(jobs, measure=False))
        print(f"{len(jobs)} kernels, {new} of them built now")
    return 0


def describe_device() -> dict[str, Any]:
    """The device and the versions that every result belongs to."""
    import torch
    import transformers
    import triton

    versions = {
        "torch": torch.__version__, "triton": triton.__version__,
        "transformers": transformers.__version__, "cuda": torch.version.cuda or "none",
    }  # fmt: skip
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"name": name, "versions": versions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("plan", choices=sorted(PLANS))
    parser.add_argument("--out", type=Path, default=Path("gpu-rows.jsonl"), help="rows go here")
    parser.add_argument(
        "--limit",
        type=float,
        default=900.0,
        help="seconds for everything; ten times as many in a dry run",
    )
    parser.add_argument(
        "--only", default="*", help="patterns of stages' names, with commas between"
    )
    parser.add_argument("--keep", action="store_true", help=f"write {RESULTS.name} as well")
    parser.add_argument("--list", action="store_true", help="show the stages, and run none")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        return do_stage(options.plan, options.stage, options.out)
    patterns = options.only.split(",")
    chosen = [
        [s for s in group if any(fnmatch.fnmatch(s.name, p) for p in patterns)]
        for group in PLANS[options.plan]()
    ]
    if options.list:
        for stage in (s for group in chosen for s in group):
            print(f"{stage.limit_s:5.0f} s  {stage.name}")
        return 0
    device = describe_device()
    if device["name"] == "none" and not DRY:
        print("no CUDA device here: TURBOTX_BENCHMARK_DRY=1 runs every line", file=sys.stderr)
        return 3
    options.out.parent.mkdir(parents=True, exist_ok=True)
    append(options.out, "device", {"device": device})
    run_plan(options.plan, chosen, options.out, options.limit * SLOWER)
    rows = read_rows([options.out])
    if options.keep:
        RESULTS.write_text(json.dumps(collect(rows), indent=1) + "\n")
    print("\n".join(["", *summarize(rows)]))
    wrong = any(row.get("holds") is False for row in rows.values())
    stopped = any(name.startswith("stage/") for name in rows)
    return int((wrong and not DRY) or stopped)


if __name__ == "__main__":
    raise SystemExit(main())
