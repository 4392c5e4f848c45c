"""Load test on loopback: an open-loop client against the real server.

In: nothing (traces are seeded). Out: JSON and plots, per policy throughput, latency and refusals.
The engine is a stand-in that sleeps its cost table, or MiniLM with its real weights. Every row is
kept as it is measured; with ``--for`` a run stops after a while, and the same command goes on::

    python benchmarks/serving.py all            # every row, smaller, within a quarter of an hour
    python benchmarks/serving.py minilm --for 200
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from http_load import Load, send_trace
from serving_clients import measure_clients
from serving_process import LONGEST, serving, sleeping_costs
from slices import Later, Slices

from turbotx.serving import POLICIES, CostTable, Request, Scheduler
from turbotx.serving.simulation import offline_capacity_per_s, simulate
from turbotx.serving.traces import make_trace, poisson_gaps, uniform_lengths

EXPERIMENTS = ("sleep", "overload", "clients", "minilm")
RESULTS = Path(__file__).parent / "results"
SCALE = 16  # the toy table slowed down, so that HTTP's own cost stays small beside it
OVERLOAD_SCALE = 20  # the same, and so that ten times the capacity is within one client's reach
UNLIMITED = {"max_age_ms": 1e6, "timeout_ms": 1e6}


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


# --- MiniLM with its weights --------------------------------------------------------------------


def serve_minilm(slices: Slices, count: int, load: float, threads: int) -> None:
    """MiniLM, texts of 5 to 500 tokens: every policy over HTTP, and the peers: PyTorch eager in
    the same server, sentence-transformers.

    Two arrivals of the same texts: Poisson at ``load`` of what the peer can do, for latency; and
    all at once, for throughput. Beside them the simulator, on the costs measured at the start.
    """
    texts, lengths = make_texts(count), uniform_lengths(5, 500)
    peer = slices.measure(
        "sentence-transformers", lambda: time_sentence_transformers(texts, threads)
    )
    rate = load * min(peer["all_at_once_per_s"], peer["one_by_one_per_s"])
    trace = make_trace(poisson_gaps, lengths, rate_per_s=rate, count=count, seed=0)
    rows = [
        {
            "server": "sentence-transformers, one by one",
            **queue_of_one(trace, peer["took_ms"]),
            "all_at_once_per_s": peer["one_by_one_per_s"],
        },
        {
            "server": "sentence-transformers, encode of all",
            "all_at_once_per_s": peer["all_at_once_per_s"],
        },
    ]
    served = {"turbotx": ("single", "fifo", "dp", "aged"), "eager": ("single", "fifo")}
    for engine, policies in served.items():
        table = slices.measure(f"costs, {engine}", lambda e=engine: measure_model(e, threads))
        for policy in policies:
            row = slices.measure(
                f"{engine}, {policy}",
                lambda e=engine, p=policy, t=table: minilm_row(e, p, threads, t, trace, texts),
            )
            costs = CostTable(table["lengths"], table["batches"], table["cost_ms"])
            queue = Scheduler(costs, POLICIES[policy](), max_batch_tokens=4096, max_queue=count)
            simulated = simulate(trace, queue)
            rows.append({
                "server": f"turbotx serve, {engine} model", "policy": policy, **row,
                "simulated_p50_ms": simulated.percentile_ms(50),
                "simulated_p99_ms": simulated.percentile_ms(99),
            })  # fmt: skip
    slices.write(rate_per_s=rate, rows=rows)


def minilm_row(
    engine: str, policy: str, threads: int, table: dict[str, Any], trace: list[Request],
    texts: list[str],
) -> dict[str, Any]:  # fmt: skip
    bodies = [json.dumps({"inputs": text}).encode() for text in texts]
    burst = [Request(r.key, r.length, 0.0) for r in trace]
    settings = {"policy": policy, "max_batch": 16, "max_batch_tokens": 4096, **UNLIMITED}
    with serving(engine=engine, threads=threads, costs=table, settings=settings) as (host, port, _):
        at_once = asyncio.run(send_trace(host, port, burst, bodies)).summary()
        found = asyncio.run(send_trace(host, port, trace, bodies)).summary()
    assert at_once["answered"] == len(trace), at_once
    return {**found, "all_at_once_per_s": at_once["per_s"]}


def measure_model(engine: str, threads: int) -> dict[str, Any]:
    import torch

    from turbotx.serving.measure import measure_costs
    from turbotx.serving.model_files import load_model

    torch.set_num_threads(threads)
    model = load_model("minilm", backend=engine, max_length=LONGEST)
    limits = {"max_length": LONGEST, "max_batch": 16, "max_tokens": 4096}
    return measure_costs(model.engine, **limits, budget_ms=60_000.0).to_dict()


def make_texts(count: int) -> list[str]:
    """Texts of U(5, 500) tokens, made of words that are one token each."""
    from turbotx.serving.model_files import find_folder

    vocabulary = (find_folder("minilm") / "vocab.txt").read_text().split()
    words = [word for word in vocabulary if re.fullmatch(r"[a-z]{3,9}", word)]
    chooser = random.Random(0)
    drawn = uniform_lengths(5, 500)(np.random.default_rng(0), count).tolist()
    return [" ".join(chooser.choices(words, k=n - 2)) for n in drawn]


def time_sentence_transformers(texts: list[str], threads: int) -> dict[str, Any]:
    """Its encode on all texts at once (it sorts by length), and on one after the other."""
    import torch
    from sentence_transformers import SentenceTransformer

    from turbotx.serving.model_files import find_folder

    torch.set_num_threads(threads)
    model = SentenceTransformer(str(find_folder("minilm")), device="cpu")
    model.max_seq_length = LONGEST
    model.encode(texts[:40], show_progress_bar=False)
    begin = time.perf_counter()
    model.encode(texts, show_progress_bar=False)
    at_once = len(texts) / (time.perf_counter() - begin)
    took = []
    for text in texts:
        begin = time.perf_counter()
        model.encode(text, show_progress_bar=False)
        took.append((time.perf_counter() - begin) * 1e3)
    return {
        "all_at_once_per_s": at_once,
        "one_by_one_per_s": 1e3 / float(np.mean(took)),
        "took_ms": took,
    }


def queue_of_one(trace: list[Request], service_ms: list[float]) -> dict[str, Any]:
    """First come, first served with the measured times (no HTTP: in the peer's favour)."""
    free_ms, latency = 0.0, []
    for request, took in zip(trace, service_ms, strict=True):
        free_ms = max(free_ms, request.arrival_ms) + took
        latency.append(free_ms - request.arrival_ms)
    return Load([200] * len(trace), latency, free_ms / 1e3).summary()


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """p50 and p99 per row as horizontal bars."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "turbotx"
    import matplotlib.pyplot as plt

    names = [
        " ".join(str(row[k]) for k in ("server", "policy", "load", "beside") if k in row)
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
    parser.add_argument("--load", type=float, default=0.9, help="of the peer's throughput")
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
    begin = time.monotonic()
    for experiment in EXPERIMENTS if asked.experiment == "all" else [asked.experiment]:
        out = asked.out / f"serving_{experiment}.json"
        if asked.again:
            out.unlink(missing_ok=True)
        try:
            rows = run(experiment, asked, out, asked.limit_s - (time.monotonic() - begin))
        except Later as error:
            print(f"not yet: {error}")
            return
        draw(rows, out.with_suffix(".svg"))


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
        parameters = {"count": count, "load": asked.load, "threads": asked.threads}
        slices = Slices(out, parameters, limit_s, asked.redo)
        serve_minilm(slices, **parameters)
    for name, passed in slices.kept.get("checks", {}).items():
        print(f"{'passed' if passed else 'FAILED'}  {name}")
    rows: list[dict[str, Any]] = slices.kept["rows"]
    return rows


if __name__ == "__main__":
    main()
