"""Times on a CUDA device: single calls, calls in a row, kernels inside a call, and ceilings.

In: something to call. Out: microseconds, medians over many runs after a warm-up::

    time_call(lambda: model(**inputs))  ->  {"latency_us": 181.0, "row_us": 165.2, "runs": 200}

latency_us: from an idle device to the result, host work included. host_us: until the call returns,
which does not wait for the device. row_us: one of many calls queued in a row, which hides host work
behind the device where it can.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_plans import DRY

Call = Callable[[], Any]
DEVICE = "cpu" if DRY else "cuda"


def time_call(call: Call, seconds: float = 0.4) -> dict[str, float]:
    """Warm up, then measure for about `seconds`."""
    for _ in range(1 if DRY else 4):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    once = max(time.perf_counter() - begin, 1e-5)
    runs = 1 if DRY else max(5, min(300, int(seconds / 2 / once)))
    singles, hosts = [], []
    for _ in range(runs):
        begin = time.perf_counter()
        call()
        hosts.append((time.perf_counter() - begin) * 1e6)
        torch.cuda.synchronize()
        singles.append((time.perf_counter() - begin) * 1e6)
    row = [time_row(call, max(1, runs // 5)) for _ in range(1 if DRY else 5)]
    return {
        "latency_us": round(statistics.median(singles), 2),
        "row_us": round(statistics.median(row), 2),
        "spread_us": round(max(row) - min(row), 2),
        "host_us": round(statistics.median(hosts), 2),
        "runs": runs,
    }


def time_replay(replay: Call, runs: int = 40) -> float:
    """Microseconds of one of many bare replays in a row: the least of five medians' runs."""
    runs = 1 if DRY else runs
    replay()
    return round(min(time_row(replay, runs) for _ in range(1 if DRY else 5)), 2)


def time_row(call: Call, count: int) -> float:
    """Microseconds of one of `count` calls queued in a row, by the device's clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / count


def time_graphed(call: Call, repeat: int = 20) -> float:
    """Microseconds of one call inside a CUDA graph of `repeat`, so that no host work counts."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeat):
            call()
    graph.replay()
    return statistics.median(time_row(graph.replay, 3) for _ in range(5)) / repeat


def measure_ceilings() -> dict[str, float]:
    """The device's own limits: a copy far larger than its caches, a large product, a launch."""
    nbytes, side = (1 << 20, 64) if DRY else (1 << 30, 8192)
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy_us = min(time_row(partial(target.copy_, source), 5) for _ in range(3))
    del source, target
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    product_us = min(time_row(lambda: a @ b, 5) for _ in range(3))
    small = torch.ones(32, device=DEVICE)
    return {
        "copy_gb_per_s": round(2 * nbytes / copy_us / 1e3, 1),
        "matmul_tflop_per_s": round(2 * side**3 / product_us / 1e6, 1),
        "graph_node_us": round(time_graphed(lambda: small.add_(1), 200), 3),
    }


def kernel_times(call: Call, runs: int = 10) -> dict[str, tuple[float, float]]:
    """Return per kernel of a call, by name: microseconds of one launch, and launches a call."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    if DRY:
        return {}
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(runs):
            call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found.setdefault(event.name, []).append(event.time_range.elapsed_us())
    return {name: (statistics.median(us), len(us) / runs) for name, us in found.items()}


def peak_memory(call: Call) -> int:
    """Bytes that PyTorch's allocator held for a call beyond what it held before."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before
