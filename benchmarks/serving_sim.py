"""Every scheduling policy in simulated time, against optimum and bounds.

In: nothing (all traces are seeded). Out: a table on the terminal and a JSON file, with the checks
that the default policy has to pass; parts of it can be run again by name::

    python benchmarks/serving_sim.py --out benchmarks/results/serving_sim.json
    python benchmarks/serving_sim.py --only fluid --out benchmarks/results/serving_sim.json
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from exact_schedule import least_mean_latency_ms

from turbotx.serving import POLICIES, Aged, CostTable, Request, Scheduler
from turbotx.serving.native import load_planner
from turbotx.serving.simulation import Outcome, offline_capacity_per_s, simulate, toy_table
from turbotx.serving.token_costs import TokenCosts
from turbotx.serving.token_policies import AgedTokens, FifoTokens
from turbotx.serving.traces import (
    GAPS,
    LENGTHS,
    lognormal_lengths,
    make_trace,
    poisson_gaps,
    uniform_lengths,
)

LONGEST, COUNT = 500, 4000
COMPARED = ("aged", "dp", "sort", "fifo")
TABLES = {
    # 4 ms to launch, then 22 us per padded token: a small GPU, batches up to 20.
    "toy": CostTable.from_function(lambda n, b: 4 + 0.022 * n * b, LONGEST, 20),
    # One CPU thread running a six-layer encoder: all but linear in padded tokens.
    "cpu": CostTable.from_function(lambda n, b: 1 + 0.45 * n * b, LONGEST, 32),
    # Bound by streaming weights up to 300 padded tokens, then by arithmetic.
    "knee": CostTable.from_function(
        lambda n, b: 5 + 0.0008 * n * b + 0.01 * max(0, n * b - 300), LONGEST, 32
    ),
}


MACHINES = {  # ms a launch, a token, a pair of tokens of a sequence
    "CPU": (0.5, 0.1, 5e-5),  # six layers of 384, about what two cores take
    "small GPU": (4.0, 0.022, 2e-6),  # the toy table, and attention
}


def run(trace: list[Request], costs: CostTable, policy: str) -> Outcome:
    return simulate(trace, Scheduler(costs, POLICIES[policy](), max_queue=len(trace)))


def compare_with_optimum(instances: int) -> dict[str, Any]:
    """Mean latency over the clairvoyant optimum's, on instances of 8 requests of the toy table."""
    costs, lengths = toy_table(), uniform_lengths(2, 100)
    rows = []
    for load in (0.4, 0.8, 1.3, 2.6):
        ratios: dict[str, list[float]] = {name: [] for name in COMPARED}
        for seed in range(instances // 4):
            trace = make_trace(poisson_gaps, lengths, rate_per_s=756 * load, count=8, seed=seed)
            best = least_mean_latency_ms(trace, costs)
            for name, found in ratios.items():
                found.append(float(run(trace, costs, name).latency_ms.mean()) / best)
        summary = {name: summarise(found) for name, found in ratios.items()}
        rows.append({"load": load, "instances": instances // 4, **summary})
        print(f"  load {load}: " + ", ".join(f"{k} {v['mean']:.3f}" for k, v in summary.items()))
    return {
        "rows": rows,
        "mean": {k: float(np.mean([row[k]["mean"] for row in rows])) for k in COMPARED},
    }


def summarise(values: list[float]) -> dict[str, float]:
    return {
        "mean": float(np.mean(values)),
        "p95": float(np.percentile(values, 95)),
        "worst": float(np.max(values)),
    }


def long_traces() -> Iterator[tuple[dict[str, Any], list[Request], CostTable]]:
    for table, gaps, lengths in product(TABLES, GAPS, LENGTHS):
        costs = TABLES[table]
        drawn = LENGTHS[lengths](np.random.default_rng(1), COUNT)
        capacity = offline_capacity_per_s(drawn.tolist(), costs)
        for load in (0.4, 0.65, 0.8, 0.9, 1.1):
            trace = make_trace(
                GAPS[gaps], LENGTHS[lengths], rate_per_s=capacity * load, count=COUNT, seed=1
            )
            name = {"table": table, "arrivals": gaps, "lengths": lengths, "load": load}
            yield {**name, "capacity_per_s": capacity}, trace, costs


def compare_on_long_traces() -> dict[str, Any]:
    """Throughput, mean and tail of every policy on every long trace."""
    rows = []
    for row, trace, costs in long_traces():
        for name in COMPARED:
            outcome = run(trace, costs, name)
            row[name] = {
                "per_s": outcome.throughput_per_s,
                "mean_ms": float(outcome.latency_ms.mean()),
                "p50_ms": outcome.percentile_ms(50),
                "p99_ms": outcome.percentile_ms(99),
                "worst_wait_ms": float(outcome.wait_ms.max()),
                "padding_ratio": outcome.padded_tokens / outcome.tokens,
            }
        rows.append(row)
    tail = [row["aged"]["p99_ms"] / row["fifo"]["p99_ms"] for row in rows]
    speed = [row["aged"]["per_s"] / row["fifo"]["per_s"] for row in rows]
    paper = [row["aged"]["p99_ms"] / row["dp"]["p99_ms"] for row in rows]
    return {
        "rows": rows,
        "worst_p99_over_fifo": max(tail),
        "worst_throughput_over_fifo": min(speed),
        "mean_p99_over_dp": float(np.mean(paper)),
        "worst_p99_over_dp": max(paper),
        "better_p99_than_dp": float(np.mean([r < 1 for r in paper])),
    }


def padded_costs(launch_ms: float, token_ms: float, square_ms: float) -> CostTable:
    """What padded batches take where `TokenCosts.from_rates` says what tokens do."""
    nodes, batches = [1, *range(10, LONGEST + 1, 10)], range(1, 33)
    return CostTable(nodes, batches, [
        [launch_ms + b * (token_ms * n + square_ms * n * n) for b in batches] for n in nodes
    ])  # fmt: skip


def compare_padding() -> list[dict[str, Any]]:
    """The same machine with padding and without: all at once, and Poisson at parts of what full
    padded batches could do."""
    rows = []
    lengths = {"U(5, 500)": LENGTHS["uniform_5_500"], "lognormal": lognormal_lengths(60, 1.0, 500)}
    for (machine, rates), mixture in product(MACHINES.items(), lengths):
        padded, packed = padded_costs(*rates), TokenCosts.from_rates(*rates, LONGEST, 16_384)
        drawn = lengths[mixture](np.random.default_rng(0), COUNT).tolist()
        capacity = offline_capacity_per_s(drawn, padded)
        for name, policy in (("aged", Aged), ("dp", POLICIES["dp"]), ("fifo", POLICIES["fifo"]),
                             ("aged", AgedTokens), ("fifo", FifoTokens)):  # fmt: skip
            costs = packed if policy in (AgedTokens, FifoTokens) else padded
            row = {"machine": machine, "lengths": mixture, "policy": name,
                   "padding": "packed" if costs is packed else "padded"}  # fmt: skip
            limits = {"max_batch": 32, "max_batch_tokens": 16_384, "max_queue": COUNT}
            for load in (0.5, 0.8, 0.95, None):
                trace = make_trace(
                    poisson_gaps, lengths[mixture], rate_per_s=capacity * (load or 1e3),
                    count=COUNT, seed=0,
                )  # fmt: skip
                outcome = simulate(trace, Scheduler(costs, policy(), **limits))
                if load is None:
                    row["all_at_once_per_s"] = outcome.throughput_per_s
                else:
                    row[f"p50_ms at {load}"] = outcome.percentile_ms(50)
                    row[f"p99_ms at {load}"] = outcome.percentile_ms(99)
            rows.append(row)
            print(row)
    return rows


def check_age_bound(bound_ms: float = 400.0) -> dict[str, Any]:
    """The longest wait of anybody admitted, from light load to four times the capacity."""
    rows = []
    for gaps, load in product(GAPS, (0.5, 0.9, 1.0, 1.5, 4.0)):
        lengths = uniform_lengths(2, 100)
        trace = make_trace(GAPS[gaps], lengths, rate_per_s=756 * load, count=COUNT, seed=2)
        outcome = simulate(trace, Scheduler(toy_table(), max_age_ms=bound_ms))
        rows.append(
            {
                "arrivals": gaps,
                "load": load,
                "worst_wait_ms": float(np.nanmax(outcome.wait_ms)),
                "refused": outcome.refused / COUNT,
                "per_s": outcome.throughput_per_s,
            }
        )
    worst = max(row["worst_wait_ms"] for row in rows)
    return {"bound_ms": bound_ms, "worst_wait_ms": worst, "rows": rows}


def find_sustained_load(limit_ms: float = 150.0) -> dict[str, Any]:
    """The largest load whose p99 stays under the limit, as a part of the offline capacity."""
    costs, lengths = toy_table(), uniform_lengths(2, 100)
    found: dict[str, Any] = {"limit_ms": limit_ms}
    for count, name in product((1000, 20_000), ("aged", "dp", "sort", "fifo")):
        sustained = []
        for seed in range(4):
            drawn = lengths(np.random.default_rng(seed), count)
            capacity = offline_capacity_per_s(drawn.tolist(), costs)
            low, high = 0.2, 1.2
            for _ in range(8):
                load = (low + high) / 2
                rate = capacity * load
                trace = make_trace(poisson_gaps, lengths, rate_per_s=rate, count=count, seed=seed)
                quick = run(trace, costs, name).percentile_ms(99) <= limit_ms
                low, high = (load, high) if quick else (low, load)
            sustained.append(low)
        found[f"{name}, {count} requests"] = float(np.mean(sustained))
        print(f"  {name}, {count} requests: {np.mean(sustained):.3f}")
    return found


def bound_without_randomness(limit_ms: float = 150.0) -> dict[str, float]:
    return {
        "limit_ms": limit_ms,
        "load": fluid_limit(limit_ms),
        "p99_ms_at_0.88": fluid_tail_ms(0.88),
    }


def fluid_limit(limit_ms: float) -> float:
    """What load any policy can sustain with 99 of 100 answered within the limit, no randomness.

    Arrivals at a steady rate, lengths spread evenly over the 99 from 2 to 100. A batch that takes
    s ms answers in time only those who came in the last limit - s ms: rate * (limit - s) / 99 of
    each length. So n members span n of these gaps, and the average one is padded by (n - 1) / 2 of
    them, whatever the policy. The best n for every length, no launch or padding at all for the 1 in
    100 who may be late, gives the least server time per request; its inverse bounds the rate.
    """
    length, members = np.arange(2, 101)[:, None], np.arange(1, 21)[None, :]
    in_time_ms = limit_ms - (4 + 0.022 * members * length)

    def busy(rate_per_ms: float) -> float:
        gap = 99 / (rate_per_ms * np.maximum(in_time_ms, 1e-9))
        extra = 4 / members + 0.022 * gap * (members - 1) / 2
        return rate_per_ms * float((0.022 * length[:, 0] + 0.99 * extra.min(1)).mean())

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if busy(middle) <= 1 else (low, middle)
    return low / (20 / (4 + 0.022 * 20 * 51))


def fluid_tail_ms(load: float) -> float:
    """The least p99 of any policy at this load, without randomness: ``fluid_limit`` inverted."""
    low, high = 50.0, 2000.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if fluid_limit(middle) >= load else (middle, high)
    return high


def time_planning(waiting: int = 1024, repeats: int = 2000) -> dict[str, float]:
    """Milliseconds to choose a batch among 1,024 waiting requests.

    Wall time, and the thread's own CPU time, which other programs on the machine disturb less.
    """
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, LONGEST + 1, waiting).tolist()
    queue = [Request(i, n, float(i)) for i, n in enumerate(lengths)]
    table, policy = TABLES["toy"].dense(), Aged()
    took, busy = [], []
    for _ in range(repeats):
        begin, begin_busy = time.perf_counter(), time.thread_time()
        policy.plan(queue, 2000.0, table)
        took.append((time.perf_counter() - begin) * 1e3)
        busy.append((time.thread_time() - begin_busy) * 1e3)
    return {
        "waiting": waiting,
        "compiled": load_planner("fill") is not None,
        "p50_ms": float(np.median(took)),
        "p99_ms": float(np.percentile(took, 99)),
        "cpu_p50_ms": float(np.median(busy)),
        "cpu_p99_ms": float(np.percentile(busy, 99)),
    }


def pairs(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The default policy's rows, with padding and without, of each machine and mixture."""
    default = [row for row in rows if row["policy"] == "aged"]
    return list(zip(default[::2], default[1::2], strict=True))


def check(result: dict[str, Any]) -> dict[str, bool]:
    small, long = result["small"], result["long"]
    return {
        "mean latency <= 1.10 x the optimum": small["mean"]["aged"] <= 1.10,
        "p99 never over 1.02 x FIFO": long["worst_p99_over_fifo"] <= 1.02,
        "throughput never under 0.98 x FIFO": long["worst_throughput_over_fifo"] >= 0.98,
        "better p99 than the paper's DP in the mean": long["mean_p99_over_dp"] < 1,
        "nobody beyond the age bound": result["age"]["worst_wait_ms"] <= result["age"]["bound_ms"],
        "without padding p99 never over 1.02 x the default's, at once never under 0.98 x": all(
            packed["all_at_once_per_s"] >= 0.98 * padded["all_at_once_per_s"]
            and all(v <= 1.02 * padded[k] for k, v in packed.items() if "p99" in k)
            for padded, packed in pairs(result["padding"])
        ),
        "0.88 of the capacity at p99 <= 150 ms": result["sustained"]["aged, 20000 requests"]
        >= 0.88,
        "planned in 1 ms of CPU at 1,024 waiting (p99)": result["planning"]["cpu_p99_ms"] <= 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    parts = {
        "planning": time_planning,
        "small": lambda: compare_with_optimum(arguments.instances),
        "long": compare_on_long_traces,
        "padding": compare_padding,
        "age": check_age_bound,
        "fluid": bound_without_randomness,
        "sustained": find_sustained_load,
    }
    parser.add_argument("--only", action="append", choices=parts, help="the rest stays as in --out")
    arguments = parser.parse_args()
    if arguments.only and not (arguments.out and arguments.out.exists()):
        parser.error("--only needs --out with a file of all the other parts")
    result: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.only else {}
    result["machine"] = platform.processor() or platform.machine()
    result["versions"] = {"python": platform.python_version(), "numpy": np.__version__}
    for name in arguments.only or parts:
        print(name)
        result[name] = parts[name]()
    result["checks"] = check(result)
    for name, passed in result["checks"].items():
        print(f"{'passed' if passed else 'FAILED'}  {name}")
    summary = {k: v for k, v in result["long"].items() if k != "rows"}
    json.dump({"planning": result["planning"], "long": summary}, sys.stdout, indent=2)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
