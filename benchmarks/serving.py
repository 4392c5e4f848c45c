"""Load test on loopback: an open-loop client against the real server.

In: nothing (traces are seeded). Out: JSON and plots, per policy throughput, latency and refusals.
The engine is a stand-in that sleeps its cost table, or MiniLM with its real weights. Every row is
kept as it is measured; with ``--for`` a run stops after a while, and the same command goes on; a
row that fails is named, the others are measured::

    python benchmarks/serving.py all            # every row, smaller, within 20 minutes
    python benchmarks/serving.py padding        # packed against padded alone: 4 minutes
    python benchmarks/serving.py minilm --for 200
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from http_load import Load, send_trace
from serving_clients import measure_clients
from serving_minilm import UNLIMITED, compare_padding, serve_minilm
from serving_process import serving, sleeping_costs
from slices import Later, Slices

from turbotx.serving import POLICIES, CostTable, Request, Scheduler
from turbotx.serving.simulation import offline_capacity_per_s, simulate
from turbotx.serving.traces import make_trace, poisson_gaps, uniform_lengths

EXPERIMENTS = ("sleep", "overload", "clients", "minilm", "padding")
RESULTS = Path(__file__).parent / "results"
SCALE = 16  # the toy table slowed down, so that HTTP's own cost stays small beside it
OVERLOAD_SCALE = 20  # the same, and so that ten times the capacity is within one client's reach


def id_bodies(trace: list[Request]) -> list[bytes]:
    return [json.dumps({"inputs": [[7592] * r.length]}).encode() for r in trace]


# --- the server against the simulator ---------------------------------------------------------


def compare_with_simulator(slices: Slices, counts: dict[float, int]) -> None:
    """The sleeping engine behind HTTP against the same trace in simulated time."""
    costs, lengths = sleeping_costs(SCALE), uniform_lengths(2, 100)
    rows = []
    for load, count in counts.items():
        drawn = lengths(np.random.default_rng(0), count).tolist()
        rate = load * offline_capacity_per_s(drawn, costs)
        trace = make_trace(poisson_gaps, lengths, rate_per_s=rate, count=count, seed=0)
        for policy in ("aged", "dp", "fifo"):
            found = slices.measure(f"{policy} at {load}", lambda p=policy, t=trace: sleep_row(p, t))
            row = {"load": load, "policy": policy, **found}
            row["simulated_per_s"], row["simulated_p99_ms"] = simulate_late(trace, costs, policy)
            row["per_s_ratio"] = row["per_s"] / row["simulated_per_s"]
            row["p99_ratio"] = row["p99_ms"] / row["simulated_p99_ms"]
            rows.append(row)
    checks = {
        "throughput within 5 % of the simulator": all(
            abs(r["per_s_ratio"] - 1) <= 0.05 for r in rows
        ),
        "p99 within 15 % of the simulator": all(abs(r["p99_ratio"] - 1) <= 0.15 for r in rows),
    }
    slices.write(scale=SCALE, rows=rows, checks=checks)


def simulate_late(trace: list[Request], costs: CostTable, policy: str) -> tuple[float, float]:
    """Throughput and p99, each the median of nine runs whose requests come up to 1 ms late.

    Near saturation a request that just misses a batch changes all batches after it: the p99 of one
    simulated run moves by 8 % with less than that.
    """
    found = []
    for seed in range(9):
        late = np.random.default_rng(seed).uniform(0, 1, len(trace))
        arrival = np.array([r.arrival_ms for r in trace]) + late
        order = np.argsort(arrival)
        shifted = [Request(k, trace[i].length, float(arrival[i])) for k, i in enumerate(order)]
        outcome = simulate(shifted, Scheduler(costs, POLICIES[policy]()))
        found.append((outcome.throughput_per_s, outcome.percentile_ms(99)))
    per_s, p99_ms = np.median(found, axis=0)
    return float(per_s), float(p99_ms)


def sleep_row(policy: str, trace: list[Request]) -> dict[str, Any]:
    settings = {"policy": policy, "max_batch": 20, "max_batch_tokens": None, **UNLIMITED}
    with serving(engine="sleep", scale=SCALE, settings=settings) as (host, port, _):
        return asyncio.run(send_trace(host, port, trace, id_bodies(trace))).summary()


# --- ten times too much -----------------------------------------------------------------------


def overload(slices: Slices, seconds: float) -> None:
    """Ten times what the sleeping engine can do, against its peak round saturation."""
    costs, lengths = sleeping_costs(OVERLOAD_SCALE), uniform_lengths(2, 100)
    capacity = offline_capacity_per_s(lengths(np.random.default_rng(0), 2000).tolist(), costs)
    rows = []
    for load in (0.9, 1.0, 1.5, 10.0):
        duration = seconds if load == 10.0 else seconds / 3
        found = slices.measure(
            f"load {load}", lambda a=capacity * load, d=duration: overload_row(a, d)
        )
        rows.append({"load": load, **found})
    peak = max(row["steady_per_s"] for row in rows[:-1])
    worst = rows[-1]
    resident = worst["resident_nbytes"]
    settled = resident[len(resident) // 4 :]
    goodput = worst["steady_per_s"] / peak
    checks = {
        "goodput at least 0.95 of the peak": goodput >= 0.95,
        "half of the refusals within 10 ms": worst["refused_p50_ms"] <= 10,
        "every request answered or refused": sum(row["other"] for row in rows) == 0,
        "memory flat: within 2 % after the first quarter": max(settled) <= 1.02 * min(settled),
    }
    slices.write(
        scale=OVERLOAD_SCALE,
        capacity_per_s=capacity,
        rows=rows,
        goodput_over_peak=goodput,
        resident_mib=[min(settled) / 2**20, max(settled) / 2**20],
        checks=checks,
    )


def overload_row(rate: float, duration: float) -> dict[str, Any]:
    lengths = uniform_lengths(2, 100)
    trace = make_trace(poisson_gaps, lengths, rate_per_s=rate, count=int(rate * duration), seed=1)
    settings = {"max_batch": 20, "max_batch_tokens": None, "max_age_ms": 6000.0}
    with (
        serving(engine="sleep", scale=OVERLOAD_SCALE, settings=settings) as (host, port, pid),
        watching(pid) as resident,
    ):
        load = asyncio.run(send_trace(host, port, trace, id_bodies(trace)))
    return {
        **load.summary(),
        "steady_per_s": steady_per_s(load, trace),
        "resident_nbytes": resident,
    }


def steady_per_s(load: Load, trace: list[Request], warm_up_ms: float = 5000.0) -> float:
    """Answers a second while requests come in: not the empty start, not the last of the queue."""
    ended = np.array([r.arrival_ms for r in trace]) + np.array(load.latency_ms)
    end_ms = trace[-1].arrival_ms
    warm_up_ms = min(warm_up_ms, end_ms / 4)
    inside = (np.array(load.statuses) == 200) & (ended > warm_up_ms) & (ended <= end_ms)
    return float(inside.sum() / (end_ms - warm_up_ms) * 1e3)


@contextmanager
def watching(pid: int) -> Iterator[list[int]]:
    """The resident bytes of a process, twice a second while the block runs."""
    path, over, found = Path(f"/proc/{pid}/statm"), threading.Event(), []

    def watch() -> None:
        while not over.wait(0.5):
            found.append(int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


# --- all of them ----------------------------------------------------------------------------------


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """p50 and p99 per row as horizontal bars."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "turbotx"
    import matplotlib.pyplot as plt

    names = [
        " ".join(str(row[k]) for k in ("server", "lengths", "policy", "load", "beside") if k in row)
        for row in rows
    ]
    rows = [
        {**r, "p50_ms": r["embed_p50_ms"], "p99_ms": r["embed_p99_ms"]} if "beside" in r else r
        for r in rows
    ]
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(rows) + 1))
    axes.barh(names, [row.get("p99_ms", 0) for row in rows], color="#b9cfe4", label="p99")
    axes.barh(names, [row.get("p50_ms", 0) for row in rows], color="#2f5d8a", label="p50")
    for i, row in enumerate(rows):
        rate = row.get("all_at_once_per_s", row.get("per_s", row.get("indexed_per_s", 0.0)))
        axes.text(row.get("p99_ms", 1), i, f" {rate:.1f}/s", va="center", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("latency, ms (throughput beside the bars)")
    axes.invert_yaxis()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "all"])
    parser.add_argument("--count", type=int, help="requests of a row (sleep, minilm: 400)")
    parser.add_argument("--seconds", type=float, help="of a row (overload 60, clients 15)")
    parser.add_argument("--load", type=float, default=0.9, help="of the peer's, or padded capacity")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument(
        "--for", type=float, dest="limit_s", default=math.inf, metavar="SECONDS",
        help="start no further measurement after this; the same command goes on",
    )  # fmt: skip
    parser.add_argument(
        "--redo", type=float, default=math.inf, metavar="CORES",
        help="measure again what was taken while others used more cores than this",
    )  # fmt: skip
    parser.add_argument("--again", action="store_true", help="forget what has been measured")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder for serving_EXPERIMENT.json and .svg"
    )
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    begin, failed = time.monotonic(), []
    for experiment in EXPERIMENTS if asked.experiment == "all" else [asked.experiment]:
        out = asked.out / f"serving_{experiment}.json"
        if asked.again:
            out.unlink(missing_ok=True)
        try:
            rows = run(experiment, asked, out, asked.limit_s - (time.monotonic() - begin))
            draw(rows, out.with_suffix(".svg"))
        except Later as error:
            print(f"not yet: {error}{', without --again' if asked.again else ''}")
            break
        except Exception as error:  # a server that did not start, a client that got no answer
            traceback.print_exc()
            failed.append(f"{experiment}: {type(error).__name__}: {error}")
    if failed:
        said = "; ".join(failed)
        sys.exit(f"not measured: {said}. What was stays: run it again without --again")


def run(
    experiment: str, asked: argparse.Namespace, out: Path, limit_s: float
) -> list[dict[str, Any]]:
    count = asked.count or (200 if asked.experiment == "all" else 400)
    if experiment == "sleep":
        counts = {0.5: 2 * count, 0.8: 3 * count}
        slices = Slices(out, {"scale": SCALE, "counts": str(counts)}, limit_s, asked.redo)
        compare_with_simulator(slices, counts)
    elif experiment == "overload":
        seconds = asked.seconds or 60.0
        slices = Slices(out, {"seconds": seconds}, limit_s, asked.redo)
        overload(slices, seconds)
    elif experiment == "clients":
        seconds = asked.seconds or 15.0
        slices = Slices(out, {"seconds": seconds}, limit_s, asked.redo)
        measure_clients(slices, seconds)
    else:
        if experiment == "padding":
            count = asked.count or 200
        parameters = {"count": count, "load": asked.load, "threads": asked.threads}
        slices = Slices(out, parameters, limit_s, asked.redo)
        (compare_padding if experiment == "padding" else serve_minilm)(slices, **parameters)
    for name, passed in slices.kept.get("checks", {}).items():
        print(f"{'passed' if passed else 'FAILED'}  {name}")
    rows: list[dict[str, Any]] = slices.kept["rows"]
    return rows


if __name__ == "__main__":
    main()
