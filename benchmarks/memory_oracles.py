"""Other planners, to measure turbotx's against: an exact solver, a library, and its instances.

In: lifetimes and sizes. Out: footprints in bytes. OR-Tools' CP-SAT proves optima, omnimalloc is
the strongest library of heuristics at hand (both Apache-2.0, extra `bench`)::

    exact(lifetimes, sizes, limit_s=20)      # -> (14745600, True)
"""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from turbotx.memory.planner import Buffer, Lifetime, lower_bound, make_planner
from turbotx.memory.planner.greedy import footprint
from turbotx.memory.planner.plan import align
from turbotx.memory.planner.solve import portfolio, solve

MINIMALLOC = Path(__file__).parent / "data" / "minimalloc"
KNOWN_FEASIBLE = 1_048_576
CHUNK_SCALE = 64
"""The chunked planner gets sizes this much larger: one of its chunks would hold an instance."""


def exact(lifetimes: Sequence[Lifetime], sizes: Sequence[int], limit_s: float) -> tuple[int, bool]:
    """The least footprint that CP-SAT finds, in bytes, and whether it is proven the least."""
    from ortools.sat.python import cp_model

    units = [align(nbytes) // 64 for nbytes in sizes]
    bound = bound_of(lifetimes, sizes) // 64
    ceiling = max(sum(units), 1)
    model = cp_model.CpModel()
    peak = model.new_int_var(bound, ceiling, "peak")
    times, places = [], []
    for i, (life, unit) in enumerate(zip(lifetimes, units, strict=True)):
        if not unit:
            continue
        start = model.new_int_var(0, ceiling, f"offset_{i}")
        end = model.new_int_var(0, ceiling, f"end_{i}")
        places.append(model.new_interval_var(start, unit, end, f"place_{i}"))
        times.append(model.new_fixed_size_interval_var(life.begin, life.end - life.begin, f"t_{i}"))
        model.add(end <= peak)
    model.add_no_overlap_2d(times, places)
    model.minimize(peak)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = limit_s
    solver.parameters.num_workers = 2
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return 0, False
    return int(solver.value(peak)) * 64, status == cp_model.OPTIMAL


def omni(lifetimes: Sequence[Lifetime], sizes: Sequence[int]) -> int:
    """omnimalloc's default portfolio, in bytes, on sizes aligned as turbotx's are."""
    import omnimalloc

    wanted = [
        omnimalloc.Allocation(id=i, size=align(nbytes), start=life.begin, end=life.end)
        for i, (nbytes, life) in enumerate(zip(sizes, lifetimes, strict=True))
        if nbytes
    ]
    placed = omnimalloc.allocate(wanted, "omni")
    return max(item.offset + item.size for item in placed)


def bound_of(lifetimes: Sequence[Lifetime], sizes: Sequence[int]) -> int:
    return lower_bound(Buffer("", n, life) for n, life in zip(sizes, lifetimes, strict=True))


def compare_on_samples(models: Sequence[Any], limit_s: float) -> list[dict[str, Any]]:
    """Each model at six shapes: turbotx's three planners, omnimalloc and the exact optimum."""
    rows = []
    for model in models:
        seed = model.class_nbytes(8, 128).tolist()
        planners = {
            kind: make_planner(
                kind, model.lifetimes, model.size_class, model.names, seed, model.samples()
            )
            for kind in ("symbolic", "greedy")
        }
        for batch, seq in ((1, 1), (1, 40), (1, 96), (7, 77), (3, 331), (20, 512)):
            classes = model.class_nbytes(batch, seq).tolist()
            sizes = [classes[c] for c in model.size_class]
            bound = bound_of(model.lifetimes, sizes)
            cold = make_planner("chunked", model.lifetimes, model.size_class, model.names, seed)
            least, proven = exact(model.lifetimes, sizes, limit_s)
            peaks = {kind: planner.offsets(classes)[1] for kind, planner in planners.items()}
            peaks["chunked_cold"] = cold.offsets(classes)[1]
            peaks["omnimalloc"] = omni(model.lifetimes, sizes)
            peaks["exact"] = least
            rows.append(
                {
                    "model": model.name,
                    "batch": batch,
                    "seq": seq,
                    "lower_bound_nbytes": bound,
                    "exact_is_proven": proven,
                    **{f"{kind}_nbytes": peak for kind, peak in peaks.items()},
                }
            )
    return rows


def load_instance(path: Path) -> tuple[list[Lifetime], list[int]]:
    rows = list(csv.DictReader(path.open()))
    lifetimes = [Lifetime(int(row["lower"]), int(row["upper"])) for row in rows]
    return lifetimes, [int(row["size"]) for row in rows]


def compare_on_minimalloc(limit_s: float) -> dict[str, Any]:
    """Footprint over lower bound for every instance and planner, and the means."""
    rows = []
    for path in sorted(MINIMALLOC.glob("*.csv")):
        lifetimes, sizes = load_instance(path)
        bound = bound_of(lifetimes, sizes)
        count = list(range(len(sizes)))
        names = [str(i) for i in count]
        greedy = make_planner("greedy", lifetimes, count, names, sizes)
        chunked = make_planner("chunked", lifetimes, count, names, sizes)
        started = time.perf_counter()
        found = solve(lifetimes, sizes, max_evaluations=1_000_000, time_limit_s=limit_s)
        took_s = time.perf_counter() - started
        first = min(footprint(offsets, sizes) for offsets in portfolio(lifetimes, sizes))
        scaled = [size * CHUNK_SCALE for size in sizes]
        rows.append(
            {
                "instance": path.stem,
                "buffers": len(sizes),
                "known_feasible": KNOWN_FEASIBLE / bound,
                "solver": found.footprint_nbytes / bound,
                "solver_s": round(took_s, 3),
                "portfolio": first / bound,
                "greedy": greedy.offsets(sizes)[1] / bound,
                "chunked": chunked.offsets(scaled)[1] / bound / CHUNK_SCALE,
                "omnimalloc": omni(lifetimes, sizes) / bound,
            }
        )
    kinds = ("known_feasible", "solver", "portfolio", "greedy", "chunked", "omnimalloc")
    means = {kind: round(float(np.mean([row[kind] for row in rows])), 4) for kind in kinds}
    return {"mean": means, "instances": rows}
