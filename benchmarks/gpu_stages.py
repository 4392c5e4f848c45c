"""The stages of `gpu.py` that look at whole models: right, how fast, beside what.

In: `emit(name, numbers)`, which keeps a row at once, and the stage's arguments. Out: rows such as::

    latency/bert-base/fp16/1x40/turbotx   {"latency_us": 190.1, "row_us": 171.0, "host_us": 60.2}
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_models import (
    DTYPES,
    SHAPES,
    VARIANTS,
    compare,
    make_call,
    make_inputs,
    make_model,
    run_plainly,
    streamed_nbytes,
)
from gpu_plans import DRY, Shape, label
from gpu_session import Session
from gpu_timing import (
    DEVICE,
    kernel_times,
    measure_ceilings,
    peak_memory,
    time_call,
    time_replay,
)

import turbotx

Emit = Callable[[str, dict[str, Any]], None]
ALTERNATING: tuple[Shape, ...] = ((1, 40), (4, 33), (1, 1), (1, 40), (2, 128))
LENGTHS: tuple[Shape, ...] = tuple((1, n) for n in (1, 16, 40, 64, 96, 128, 160, 192))
# What one graph is bound to: the program (folded or not), options.
BOUND: dict[str, tuple[bool | None, dict[str, Any]]] = {
    "default": (None, {}),
    "fold": (True, {}),
    "fold-no-pdl": (True, {"pdl": False}),
    "store": (False, {}),
    "store-no-pdl": (False, {"pdl": False}),
}


def ceilings(emit: Emit) -> None:
    """What the device does at best."""
    emit("device/ceilings", measure_ceilings())


def right(emit: Emit, name: str, dtype: str, layers: int | None = None, engine: str = "") -> None:
    """A model against float64 at shapes that alternate, plainly, captured and replayed; one capture
    has to serve them all."""
    model = make_model(name, DTYPES[dtype], layers)
    fast = turbotx.optimize(model, **VARIANTS.get(f"turbotx-{engine}", {}))
    rows = {}
    for shape in ALTERNATING:
        inputs = make_inputs(model, *shape, DTYPES[dtype], padded=True)
        rows[label(shape)] = compare(model, fast, inputs)
    stats = fast.stats()
    emit(
        "/".join(["right", name, dtype, *([engine] if engine else [])]),
        {
            "holds": all(row["holds"] for row in rows.values()) and stats["captures"] == 1,
            "worst": max(row["turbotx"] / row["allowed"] for row in rows.values()),
            "captures": stats["captures"], "builds": stats["kernel_builds"],
            "graphs": stats["graph_captures"], "rows": rows,
        },
    )  # fmt: skip


def latency(emit: Emit, name: str, dtype: str, shape: Shape) -> None:
    """turbotx as users have it, its programs bound otherwise, eager plainly and in a graph."""
    begin = time.perf_counter()
    session = Session(name, dtype, shape=shape)
    torch.cuda.synchronize()
    ready_s = round(time.perf_counter() - begin, 2)
    place, fast = f"latency/{name}/{dtype}/{label(shape)}", session.fast
    inputs = session.inputs(shape)
    row: dict[str, Any] = {"ready_s": ready_s, **time_call(lambda: fast(**inputs))}
    row["peak_nbytes"] = peak_memory(lambda: fast(**inputs))
    row["arena_nbytes"] = fast.stats()["mapped_nbytes"]
    row["streamed_nbytes"] = streamed_nbytes(session.model)
    emit(f"{place}/turbotx", row)
    for way, (folded, options) in BOUND.items():
        if folded and len(session.variant.compiled.programs) < 2:
            continue
        bound = session.bind(shape, folded, **options)
        replay_us = time_replay(bound.replay())
        emit(f"{place}/replay-{way}", {"replay_us": replay_us, "launches": bound.launches})
    for engine in ("eager", "eager-graphs"):
        emit(f"{place}/{engine}", time_call(make_call(engine, session.model, inputs), 0.2))


def kernels(emit: Emit, name: str, dtype: str, shape: Shape) -> None:
    """What each kernel of a call takes, of both of its programs."""
    session = Session(name, dtype, shape=shape)
    for way in ("fold-no-pdl", "store-no-pdl"):
        if way == "store-no-pdl" or len(session.variant.compiled.programs) > 1:
            rows = _kernel_rows(session, shape, BOUND[way])
            emit(f"kernels/{name}/{dtype}/{label(shape)}/{way}", rows)


def _kernel_rows(
    session: Session, shape: Shape, way: tuple[bool | None, dict[str, Any]]
) -> dict[str, Any]:
    """Microseconds and launches of every kernel of a replayed call, by name."""
    bound = session.bind(shape, way[0], **way[1])
    times = kernel_times(bound.replay())
    rows = {n: {"us": round(us, 3), "launches": count} for n, (us, count) in times.items()}
    return {"sum_us": round(sum(us * n for us, n in times.values()), 1), "kernels": rows}


def shapes(emit: Emit, name: str, dtype: str, given: Sequence[Shape] = tuple(SHAPES)) -> None:
    """turbotx over many shapes with one capture, eager beside it."""
    session = Session(name, dtype)
    chosen = given[:2] if DRY else given
    calls = {shape: session.inputs(shape) for shape in chosen}
    for inputs in calls.values():
        session.fast(**inputs)
    for shape, inputs in calls.items():
        row = time_call(lambda inputs=inputs: session.fast(**inputs), 0.12)  # type: ignore[misc]
        theirs = time_call(make_call("eager", session.model, inputs), 0.12)
        row["eager_us"], row["eager_row_us"] = theirs["latency_us"], theirs["row_us"]
        row["streamed_nbytes"] = streamed_nbytes(session.model)
        emit(f"shapes/{name}/{dtype}/{label(shape)}", row)
    emit(f"shapes/{name}/{dtype}/stats", session.fast.stats())


def norms(emit: Emit, name: str, dtype: str, given: Sequence[Shape] = LENGTHS) -> None:
    """Bare replays at many lengths: as chosen, with norms folded and with norms stored."""
    session = Session(name, dtype)
    ways = ("default", "fold", "store")
    chosen = given[:2] if DRY else given
    bound = {
        (shape, way): session.bind(shape, BOUND[way][0], **BOUND[way][1])
        for shape in chosen
        for way in ways
    }
    replays = {key: b.replay() for key, b in bound.items()}
    for shape in chosen:
        row = {way: time_replay(replays[shape, way], 20) for way in ways}
        emit(f"norms/{name}/{dtype}/{label(shape)}", row)


def baseline(
    emit: Emit, name: str, dtype: str, shape: Shape, engine: str, timed: bool = True
) -> None:  # fmt: skip
    """torch.compile in one mode at one shape; not `timed`: only fill its cache on disk."""
    model = make_model(name, DTYPES[dtype])
    inputs = make_inputs(model, *shape, DTYPES[dtype])
    begin = time.perf_counter()
    call = make_call(engine, model, inputs)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    ready_s = round(time.perf_counter() - begin, 2)
    row = time_call(call) if timed else {}
    kind = "latency" if timed else "warm"
    emit(f"{kind}/{name}/{dtype}/{label(shape)}/{engine}", {"ready_s": ready_s, **row})


def stream(emit: Emit, name: str, dtype: str, requests: int = 1000) -> None:
    """Requests of random lengths at batch 1: what they take, and what is built or allocated."""
    requests = 5 if DRY else requests
    model = make_model(name, DTYPES[dtype])
    fast = turbotx.optimize(model)
    longest = make_inputs(model, 1, 512, DTYPES[dtype])
    begin = time.perf_counter()
    fast(**longest)
    torch.cuda.synchronize()
    first_s = time.perf_counter() - begin
    for length in (512, 512, 512, 16, 16):
        fast(**make_inputs(model, 1, length, DTYPES[dtype]))
    before = fast.stats()
    numbers = random.Random(0)
    given = [make_inputs(model, 1, numbers.randint(1, 512), DTYPES[dtype]) for _ in range(requests)]
    ways = (("turbotx", fast), ("eager", lambda **inputs: run_plainly(model, inputs)))
    taken = {engine: _time_each(call, given) for engine, call in ways}
    after = fast.stats()
    grown = {k: after[k] - before[k] for k in after}
    emit(f"stream/{name}/{dtype}",
         {**taken, "first_s": round(first_s, 2), "grown": grown, "stats": after})  # fmt: skip


def _time_each(call: Callable[..., Any], given: Sequence[dict[str, torch.Tensor]]) -> Any:
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
    return {
        "mean_us": round(statistics.mean(singles), 1),
        "p50_us": round(singles[len(singles) // 2], 1),
        "p99_us": round(singles[len(singles) * 99 // 100], 1),
        "allocations_by_pytorch": torch.cuda.memory_stats()["num_device_alloc"] - mallocs,
    }


def first(emit: Emit, name: str, dtype: str, kind: str) -> None:
    """Seconds to the first result in this process. kind: whether kernels are built already."""
    begin = time.perf_counter()
    model = make_model(name, DTYPES[dtype])
    inputs = make_inputs(model, 1, 40, DTYPES[dtype])
    torch.cuda.synchronize()
    made = time.perf_counter()
    fast = turbotx.optimize(model)
    fast(**inputs)
    torch.cuda.synchronize()
    end = time.perf_counter()
    emit(f"first/{name}/{dtype}/{kind}",
         {"model_s": round(made - begin, 2), "first_result_s": round(end - made, 2),
          "kernel_builds": fast.stats()["kernel_builds"]})  # fmt: skip


def architectures(emit: Emit, part: int, parts: int) -> None:
    """Every `parts`-th architecture of docs/architectures.md, cut to two layers, in float16 and
    bfloat16."""
    import architectures as known
    import parity

    from turbotx.runtime.cuda.runtime import CudaRuntime

    # Kernels of other numbers of tokens are not built beforehand: these are many models.
    CudaRuntime.expected_jobs = lambda self, dims: []  # type: ignore[method-assign]
    for name in known.ARCHITECTURES[part::parts]:
        for dtype in DTYPES:
            try:
                model = parity.make_model(name, 2, vocab=1000).to(DEVICE, DTYPES[dtype])
                emit(f"architecture/{name}/{dtype}", _check_shapes(model, DTYPES[dtype]))
            except Exception as error:
                emit(f"architecture/{name}/{dtype}",
                     {"holds": False, "error": traceback.format_exc()[-1500:]})  # fmt: skip
                if is_sticky(error):
                    raise


def _check_shapes(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    import parity

    fast, rows = turbotx.optimize(model), []
    for batch, seq in ((2, 17), (1, 1)):
        inputs = parity.make_inputs(model, batch, seq, dtype)
        rows.append(compare(model, fast, {k: v.to(DEVICE) for k, v in inputs.items()}))
    worst = max(r["turbotx"] / r["allowed"] for r in rows)
    stats = fast.stats()
    return {"holds": all(r["holds"] for r in rows), "worst": round(worst, 3),
            "captures": stats["captures"], "builds": stats["kernel_builds"]}  # fmt: skip


def saved(emit: Emit, path: str, name: str, dtype: str, runs: int = 3) -> None:
    """A model saved elsewhere without its weights (`gpu_ready.py`), from the files to a result."""
    import safetensors.torch
    from saved_model import measure

    if DRY:
        return  # the file is for a device
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        state = make_model(name, DTYPES[dtype]).state_dict()
        safetensors.torch.save_file({k: v.contiguous().cpu() for k, v in state.items()}, weights)
        for run in range(runs):
            emit(f"saved/{name}/{dtype}/{run}", measure(Path(path), DEVICE, weights))


def device_tests(emit: Emit) -> None:
    """The tests that need a device."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header", "tests/runtime",
         "tests/saved"],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    last = (done.stdout.splitlines() or [""])[-1]
    holds = done.returncode == 0 or DRY
    emit("tests", {"holds": holds, "last": last, "output": "" if holds else done.stdout[-3000:]})


def is_sticky(error: BaseException) -> bool:
    """Tell whether a CUDA error has broken this process's context."""
    text = str(error)
    return "CUDA error" in text or isinstance(error, getattr(torch, "AcceleratorError", ()))
