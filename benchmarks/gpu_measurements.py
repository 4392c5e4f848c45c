"""What `gpu.py` measures: one function a kind of measurement, each returning plain numbers.

In: names and shapes. Out: dictionaries for JSON; `ceilings` are those of `gpu_timing`::

    measure_latency("bert-base", "fp16", (1, 40), "turbotx")  ->  {"latency_us": 178.2, ...}
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_models import (
    DTYPES,
    VARIANTS,
    compare,
    make_call,
    make_inputs,
    make_model,
    streamed_nbytes,
)
from gpu_timing import DEVICE, kernel_times, peak_memory, time_call, time_graphed, time_row
from torch.nn import functional

import turbotx

MANY_BYTES = 1 << 29  # several times the caches of any GPU
LENGTHS = (1, 16, 40, 64, 96, 128, 160, 192)


def check_kernels(name: str, dtype: str) -> dict[str, Any]:
    """Every launch of two layers against float64, on the inputs that it meets, padded rows too."""
    model = make_model(name, DTYPES[dtype], layers=2)
    inputs = make_inputs(model, 3, 37, DTYPES[dtype], padded=True)
    report = turbotx.explain(model, **inputs)
    numerics = report.numerics(model, **inputs)
    worst = max(e.turbotx / e.allowed if e.allowed else 0.0 for e in numerics.launches)
    return {
        "holds": numerics.holds,
        "launches": len(numerics.launches),
        "worst_share_of_allowed": round(worst, 3),
        "broken": [f"{e.name} ({e.kernel})" for e in numerics.launches if not e.holds],
    }


def check_model(name: str, dtype: str, engine: str = "turbotx") -> dict[str, Any]:
    """A model against float64, plainly, captured and replayed, at shapes that alternate.

    BERT-base at its full depth, the others cut to two layers.
    """
    model = make_model(name, DTYPES[dtype], None if name == "bert-base" else 2)
    fast = turbotx.optimize(model, **VARIANTS.get(engine, {}))
    rows = {}
    for batch, seq in ((1, 40), (4, 33), (1, 1), (1, 40), (2, 128)):
        inputs = make_inputs(model, batch, seq, DTYPES[dtype], padded=True)
        rows[f"{batch}x{seq}"] = compare(model, fast, inputs)
    return {"holds": all(row["holds"] for row in rows.values()), "rows": rows, **fast.stats()}


def measure_latency(name: str, dtype: str, shape: tuple[int, int], engine: str) -> dict[str, Any]:
    """One engine at one shape."""
    model = make_model(name, DTYPES[dtype])
    inputs = make_inputs(model, *shape, DTYPES[dtype])
    begin = time.perf_counter()
    call = make_call(engine, model, inputs)
    call()
    torch.cuda.synchronize()
    ready_s = time.perf_counter() - begin
    found: dict[str, Any] = {"ready_s": round(ready_s, 2), **time_call(call)}
    found["peak_nbytes"] = peak_memory(call)
    found["streamed_nbytes"] = streamed_nbytes(model)
    if engine.startswith("turbotx"):  # its arena is none of PyTorch's allocator's
        found["arena_nbytes"] = call.func.stats()["mapped_nbytes"]  # type: ignore[attr-defined]
    return found


def measure_shapes(name: str, dtype: str, shapes: list[tuple[int, int]]) -> dict[str, Any]:
    """turbotx over many shapes with one capture, eager beside it."""
    model = make_model(name, DTYPES[dtype])
    fast = turbotx.optimize(model)
    rows = {}
    for shape in shapes:
        inputs = make_inputs(model, *shape, DTYPES[dtype])
        ours = time_call(lambda inputs=inputs: fast(**inputs), 0.3)
        ours["peak_nbytes"] = peak_memory(lambda inputs=inputs: fast(**inputs))
        eager = make_call("eager", model, inputs)
        theirs = time_call(eager, 0.3)
        theirs["peak_nbytes"] = peak_memory(eager)
        rows[f"{shape[0]}x{shape[1]}"] = {"turbotx": ours, "eager": theirs}
    return {"rows": rows, "streamed_nbytes": streamed_nbytes(model), "stats": fast.stats()}


def measure_kernels(name: str, dtype: str, shape: tuple[int, int]) -> dict[str, Any]:
    """Time, launches and achieved bandwidth of every kernel of a call, cuBLAS's among them."""
    model = make_model(name, DTYPES[dtype])
    inputs = make_inputs(model, *shape, DTYPES[dtype])
    fast = turbotx.optimize(model, cuda_graphs=False)
    times = kernel_times(lambda: fast(**inputs))
    report = turbotx.explain(fast, **inputs)
    nbytes: dict[str, int] = {}
    for launch, described in zip(report.compiled.assembly.launches, report.launches, strict=True):
        own = getattr(launch.target, "name", "")
        nbytes.setdefault(own, described.traffic.compulsory_nbytes)
    rows = {}
    for kernel, (us, count) in sorted(times.items(), key=lambda x: -x[1][0] * x[1][1]):
        row: dict[str, float] = {"us": round(us, 3), "launches": count}
        if nbytes.get(kernel):
            row["compulsory_nbytes"] = nbytes[kernel]
            row["gb_per_s"] = round(nbytes[kernel] / us / 1e3, 1)
        rows[kernel] = row
    total = sum(us * count for us, count in times.values())
    return {"kernels": rows, "sum_us": round(total, 2), "launches": len(report.launches)}


def measure_function(
    function: str, width: int, dtype: str, engine: str, large: bool
) -> dict[str, Any]:
    """Softmax or LayerNorm: of many rows in a row of calls, of 40 rows inside a graph."""
    rows = MANY_BYTES // (width * DTYPES[dtype].itemsize) if large else 40
    x = torch.randn(rows, width, dtype=DTYPES[dtype], device=DEVICE)
    weight, bias = (torch.randn(width, dtype=x.dtype, device=DEVICE) for _ in range(2))

    def softmax(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return functional.softmax(x, -1)

    def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (width,), weight, bias)

    plain: Callable[..., torch.Tensor] = softmax if function == "softmax" else layer_norm
    if engine == "turbotx":
        run = turbotx.optimize(plain, cuda_graphs=False)
    elif engine == "inductor":
        torch._dynamo.reset()
        run = torch.compile(plain, dynamic=False)
    else:
        run = plain
    with torch.no_grad():
        exact = plain(x[-9:].double(), weight.double(), bias.double())
        error = float((run(x, weight, bias)[-9:].double() - exact).abs().max())
        if not error <= 2e-2 * float(exact.abs().max()):
            raise RuntimeError(f"{engine} is wrong by {error}")
        if large:
            us = statistics.median(time_row(lambda: run(x, weight, bias), 10) for _ in range(5))
        else:
            us = time_graphed(lambda: run(x, weight, bias))
    return {"us": round(us, 3), "gb_per_s": round(2 * x.nbytes / us / 1e3, 1), "rows": rows}


def measure_stream(name: str, dtype: str, requests: int) -> dict[str, Any]:
    """Requests of random lengths at batch 1: what they take, and what is built or allocated."""
    model = make_model(name, DTYPES[dtype])
    fast = turbotx.optimize(model)
    longest = make_inputs(model, 1, 512, DTYPES[dtype])
    begin = time.perf_counter()
    fast(**longest)
    torch.cuda.synchronize()
    first_s = time.perf_counter() - begin
    for _ in range(3):
        fast(**longest)
    before = fast.stats()
    numbers = random.Random(0)
    given = [make_inputs(model, 1, numbers.randint(1, 512), DTYPES[dtype]) for _ in range(requests)]
    taken = {}
    for engine, call in (("turbotx", fast), ("eager", make_eager(model))):
        call(**given[0])
        torch.cuda.synchronize()
        mallocs = torch.cuda.memory_stats()["num_device_alloc"]
        singles = []
        for inputs in given:
            begin = time.perf_counter()
            call(**inputs)
            torch.cuda.synchronize()
            singles.append((time.perf_counter() - begin) * 1e6)
        singles.sort()
        taken[engine] = {
            "mean_us": round(statistics.mean(singles), 1),
            "p50_us": round(singles[len(singles) // 2], 1),
            "p99_us": round(singles[len(singles) * 99 // 100], 1),
            "allocations_by_pytorch": torch.cuda.memory_stats()["num_device_alloc"] - mallocs,
        }
    after = fast.stats()
    grown = {k: after[k] - before[k] for k in after}
    return {**taken, "first_s": round(first_s, 2), "grown": grown, "stats": after}


def make_eager(model: Any) -> Callable[..., Any]:
    @torch.no_grad()
    def run(**inputs: torch.Tensor) -> Any:
        return model(**inputs)

    return run


def measure_cold_start(name: str, dtype: str) -> dict[str, Any]:
    """A new process with an empty cache: seconds to the first result, and its parts."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ, "TURBOTX_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder,
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }  # fmt: skip
        command = [sys.executable, __file__, name, dtype]
        begin = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        found = json.loads(done.stdout.splitlines()[-1])
        return {"process_s": round(time.perf_counter() - begin, 2), **found}


def _start(name: str, dtype: str) -> None:
    """What the process of `measure_cold_start` does."""
    begin = time.perf_counter()
    model = make_model(name, DTYPES[dtype])
    inputs = make_inputs(model, 1, 40, DTYPES[dtype])
    torch.cuda.synchronize()
    made = time.perf_counter()
    fast = turbotx.optimize(model)
    fast(**inputs)
    torch.cuda.synchronize()
    end = time.perf_counter()
    builds = fast.stats()["kernel_builds"]
    print(json.dumps({"model_s": round(made - begin, 2), "first_result_s": round(end - made, 2),
                      "kernel_builds": builds}))  # fmt: skip


if __name__ == "__main__":
    _start(*sys.argv[1:])
