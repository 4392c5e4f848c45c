"""How close planned memory comes to the least possible, how fast plans are, and who does worse.

In: launch lists of four model families, as compiled and made by hand, or others in that form.
Out: tables on the terminal and a JSON file. Sections may be run alone, each replaces its part::

    python benchmarks/memory.py [grid] [speed] [stream] [oracles] [minimalloc] [--launches FILE]
    python benchmarks/memory.py architectures    # the compiler's own, 2 to 48 layers, four minutes
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory_models import LaunchList, Sized, compiled_models, hand_models, size
from memory_oracles import compare_on_minimalloc, compare_on_samples
from memory_plans import LAYERS, plan_architectures
from memory_stream import run_stream

from turbotx.kernels.processor import processor_name
from turbotx.memory.planner import Planner, check_plan, make_planner
from turbotx.memory.pool import ChunkPool

RESULTS = Path(__file__).parent / "results" / "memory.json"
SECTIONS = ("grid", "speed", "stream", "oracles", "minimalloc", "architectures")
KINDS = ("symbolic", "greedy", "chunked")


def planner_of(model: Sized, kind: str) -> Planner:
    seed = model.class_nbytes(8, 128).tolist()
    return make_planner(kind, model.lifetimes, model.size_class, model.names, seed, model.samples())


def measure_grid(models: list[Sized], others: int) -> list[dict[str, Any]]:
    """Every shape of batch 1..20 x length 1..512; greedy and chunked on `others` of them."""
    rows = []
    batch, seq = (x.ravel() for x in np.mgrid[1:21, 1:513])
    sampled = np.random.default_rng(0).choice(len(batch), others, replace=False)
    for model in models:
        classes = model.class_nbytes(batch, seq).T.tolist()
        planner: Any = planner_of(model, "symbolic")
        bounds = np.array([planner.lower_bound(c) for c in classes])
        peaks = np.array([planner.offsets(c)[1] for c in classes])
        for index in sampled[:20]:
            check_plan(planner.plan(classes[index]))
        row = {
            "model": model.name,
            "buffers": len(model.names),
            "launches": model.launch_count,
            "shapes": len(classes),
            "orientations": len(planner.orientations),
            "forms": planner.form_count,
            "proven_optimal_for_all_sizes": planner.optimal_everywhere,
            "symbolic": _ratios(peaks, bounds),
        }
        greedy = planner_of(model, "greedy")
        row["greedy"] = _ratios(
            np.array([greedy.offsets(classes[i])[1] for i in sampled]), bounds[sampled]
        )
        cold = [planner_of(model, "chunked").offsets(classes[i])[1] for i in sampled]
        row["chunked_cold"] = _ratios(np.array(cold), bounds[sampled])
        rows.append(row)
        s, g, c = row["symbolic"], row["greedy"], row["chunked_cold"]
        print(
            f"{model.name:32s} at the bound on {100 * s['share_at_bound']:6.2f} %, worst "
            f"{s['worst']:.4f} | greedy {g['mean']:.3f} / {g['worst']:.3f} | chunked "
            f"{c['mean']:.3f} / {c['worst']:.3f}"
        )
    return rows


def _ratios(peaks: np.ndarray, bounds: np.ndarray) -> dict[str, float]:
    ratio = peaks / bounds
    return {
        "share_at_bound": float(np.mean(peaks == bounds)),
        "mean": float(ratio.mean()),
        "worst": float(ratio.max()),
        "shapes": len(ratio),
    }


def measure_speed(models: list[Sized], repeats: int) -> list[dict[str, Any]]:
    """Medians in microseconds over changing shapes: a plan, and a plan with every address set."""
    rows = []
    random = np.random.default_rng(0)
    shapes = [(int(random.integers(1, 21)), int(random.integers(1, 513))) for _ in range(64)]
    for model in models:
        stream = [model.class_nbytes(batch, seq).tolist() for batch, seq in shapes]
        row: dict[str, Any] = {"model": model.name, "buffers": len(model.names)}
        for kind in KINDS:
            started = time.perf_counter()
            planner = planner_of(model, kind)
            row[f"{kind}_build_ms"] = round(1e3 * (time.perf_counter() - started), 2)
            row[f"{kind}_plan_us"] = _median_us(planner.offsets, stream, repeats)
        bind = _binder(planner_of(model, "symbolic"), len(model.names))
        row["symbolic_plan_and_bind_us"] = _median_us(bind, stream, repeats)
        rows.append(row)
        print(
            f"{model.name:32s} {row['buffers']:4d} buffers: plan {row['symbolic_plan_us']:.1f} us, "
            f"with binding {row['symbolic_plan_and_bind_us']:.1f} us (greedy "
            f"{row['greedy_plan_us']:.0f}, chunked {row['chunked_plan_us']:.0f})"
        )
    return rows


def _binder(planner: Planner, count: int) -> Callable[[list[int]], None]:
    """A plan, an arena for it, and the address of every buffer in a table that C code reads."""
    pool = ChunkPool(torch.device("cpu"))
    addresses = (ctypes.c_int64 * count)()
    table = np.frombuffer(addresses, dtype=np.int64)

    def bind(classes: list[int]) -> None:
        offsets, footprint_nbytes = planner.offsets(classes)
        with pool.lease(footprint_nbytes) as arena:
            np.add(offsets, arena.data_ptr, out=table)

    return bind


def _median_us(call: Any, stream: list[list[int]], repeats: int) -> float:
    times = []
    for step in range(repeats):
        classes = stream[step % len(stream)]
        started = time.perf_counter()
        call(classes)
        times.append(time.perf_counter() - started)
    return round(1e6 * float(np.median(times)), 2)


def print_stream(row: dict[str, Any]) -> None:
    bound = row["largest_lower_bound_nbytes"]
    print(
        f"{row['model']}: {row['requests']} requests, largest lower bound {bound / 2**20:.1f} MiB"
    )
    for way, found in row["ways"].items():
        print(
            f"  {way:34s} {found['peak_over_largest_bound']:.3f} x the bound, "
            f"{found['device_allocations']} device allocations"
        )


def print_sample(row: dict[str, Any]) -> None:
    ways = ("symbolic", "exact", "omnimalloc", "greedy", "chunked_cold")
    ratios = [f"{way} {row[f'{way}_nbytes'] / row['lower_bound_nbytes']:.4f}" for way in ways]
    proven = "" if row["exact_is_proven"] else " (exact not proven)"
    print(f"{row['model']:32s} ({row['batch']}, {row['seq']}): {', '.join(ratios)}{proven}")


def machine() -> dict[str, Any]:
    """What the numbers were taken on; a load well above 0 means that timings were disturbed."""
    names = ("torch", "numpy", "ortools", "omnimalloc")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {
        "device": processor_name(),
        "cores": os.cpu_count(),
        "load_average": load,
        "versions": versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--launches", type=Path, nargs="*", help="JSON launch lists instead")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, shorter limits")
    options = parser.parse_args()
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section is called {', '.join(sorted(unknown))}")
    lists = compiled_models() + hand_models()
    if options.launches:
        lists = [LaunchList.from_json(path) for path in options.launches]
    models = [size(item) for item in lists]
    first = models[:4]
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.sections or SECTIONS:
        print(f"-- {name}")
        if name == "grid":
            part: Any = measure_grid(models, 40 if options.quick else 200)
        elif name == "speed":
            part = measure_speed(models, 200 if options.quick else 1000)
        elif name == "stream":
            part = [run_stream(model, 100 if options.quick else 500) for model in first]
            for row in part:
                print_stream(row)
        elif name == "oracles":
            part = compare_on_samples(models[:12], 5 if options.quick else 20)
            for row in part:
                print_sample(row)
        elif name == "architectures":
            part = []
            for row in plan_architectures(layers=(2, 12) if options.quick else LAYERS):
                part.append(row)
                print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        else:
            part = compare_on_minimalloc(0.2 if options.quick else 1.0)
            print(part["mean"])
        results[name] = {"machine": machine(), "rows": part}
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
