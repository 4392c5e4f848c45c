"""Load test on loopback: an open-loop client against the real server.

In: nothing (traces are seeded). Out: JSON and plots, per policy throughput, latency and refusals.
The engine is a stand-in that sleeps its cost table, or MiniLM with its real weights::

    python benchmarks/serving.py sleep --out benchmarks/results/serving_sleep.json
    python benchmarks/serving.py minilm --out benchmarks/results/serving_minilm.json
    python benchmarks/serving.py minilm-costs --out benchmarks/results/serving_minilm_costs.json
    python benchmarks/serving.py overload --out benchmarks/results/serving_overload.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from http_load import Load, send_trace

from turbotx.serving import POLICIES, CostTable, Request, Scheduler
from turbotx.serving.simulation import offline_capacity_per_s, simulate
from turbotx.serving.traces import make_trace, poisson_gaps, uniform_lengths

SCALE = 8  # the toy table slowed down, so that HTTP's own cost stays small beside it
LONGEST = 512


def sleeping_costs(scale: float) -> CostTable:
    return CostTable.from_function(lambda n, b: scale * (4 + 0.022 * n * b), 100, 20)


# --- the server, in a process of its own ------------------------------------------------------


def run_server(options: dict[str, Any]) -> None:
    from turbotx.serving.engine import Head, SleepEngine
    from turbotx.serving.logs import log_as_json
    from turbotx.serving.model_files import LoadedModel, ModelInfo, find_folder, load_model
    from turbotx.serving.server import run
    from turbotx.serving.settings import Settings
    from turbotx.serving.tokens import TextTokenizer

    log_as_json("warning")
    engine = options["engine"]
    if engine == "sleep":
        costs = sleeping_costs(options["scale"])
        sleeping = SleepEngine(costs, head=Head("embedding"))
        info = ModelInfo("sleep", "", "float32", costs.max_length, 8, sleeping.head)
        tokenizer = TextTokenizer.load(find_folder("minilm"), costs.max_length)
        model = LoadedModel(sleeping, tokenizer, info)
    else:
        import torch

        torch.set_num_threads(options["threads"])
        model = load_model("minilm", backend=engine, max_length=LONGEST)
    settings = Settings(**{"cache_nbytes": 0, "coalesce": False, **options["settings"]})
    run(model, settings, host="127.0.0.1", port=options["port"])


@contextmanager
def serving(**options: Any) -> Iterator[tuple[str, int, int]]:
    """Host, port and process id of a server that is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "serve", json.dumps({**options, "port": port})]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["."] + sys.path[1:])}
    process = subprocess.Popen(command, env=environment)
    try:
        _wait_ready(f"http://127.0.0.1:{port}/ready", process)
        yield "127.0.0.1", port, process.pid
    finally:
        process.terminate()
        process.wait(60)


def _wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        if process.poll() is not None:
            raise RuntimeError(f"the server exited with {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError("the server was not ready within two minutes")


def id_bodies(trace: list[Request]) -> list[bytes]:
    return [json.dumps({"inputs": [[7592] * r.length]}).encode() for r in trace]


# --- the experiments ---------------------------------------------------------------------------


def compare_with_simulator(count: int) -> dict[str, Any]:
    """The sleeping engine behind HTTP against the same trace in simulated time."""
    costs = sleeping_costs(SCALE)
    lengths = uniform_lengths(2, 100)
    capacity = offline_capacity_per_s(lengths(np.random.default_rng(0), count).tolist(), costs)
    rows = []
    for load in (0.5, 0.8):
        trace = make_trace(poisson_gaps, lengths, rate_per_s=capacity * load, count=count, seed=0)
        for policy in ("aged", "dp", "fifo"):
            settings = {"policy": policy, "max_batch": 20, "max_batch_tokens": None,
                        "max_age_ms": 1e6, "timeout_ms": 1e6}  # fmt: skip
            with serving(engine="sleep", scale=SCALE, settings=settings) as (host, port, _):
                found = asyncio.run(send_trace(host, port, trace, id_bodies(trace))).summary()
            simulated = simulate(trace, Scheduler(costs, POLICIES[policy]()))
            found["simulated_per_s"] = simulated.throughput_per_s
            found["simulated_p99_ms"] = simulated.percentile_ms(99)
            found["per_s_ratio"] = found["per_s"] / found["simulated_per_s"]
            found["p99_ratio"] = found["p99_ms"] / found["simulated_p99_ms"]
            rows.append({"load": load, "policy": policy, **found})
            print(rows[-1], flush=True)
    return {"scale": SCALE, "capacity_per_s": capacity, "rows": rows}


def overload(seconds: float) -> dict[str, Any]:
    """Ten times what the sleeping engine can do, against its peak just under saturation."""
    scale = 20.0
    costs, lengths = sleeping_costs(scale), uniform_lengths(2, 100)
    capacity = offline_capacity_per_s(lengths(np.random.default_rng(0), 2000).tolist(), costs)
    settings = {"max_batch": 20, "max_batch_tokens": None, "max_age_ms": 6000.0}
    rows = []
    with serving(engine="sleep", scale=scale, settings=settings) as (host, port, pid):
        for load, duration in ((0.9, 30.0), (1.0, 30.0), (1.2, 30.0), (10.0, seconds)):
            rate = capacity * load
            trace = make_trace(
                poisson_gaps, lengths, rate_per_s=rate, count=int(rate * duration), seed=1
            )
            before = _resident_nbytes(pid)
            found = asyncio.run(send_trace(host, port, trace, id_bodies(trace))).summary()
            after = _resident_nbytes(pid)
            rows.append({"load": load, **found, "resident_nbytes": [before, after]})
            print(rows[-1], flush=True)
    peak = max(row["per_s"] for row in rows[:-1])
    return {
        "capacity_per_s": capacity,
        "rows": rows,
        "goodput_over_peak": rows[-1]["per_s"] / peak,
        "unanswered": sum(row["other"] for row in rows),
    }


def _resident_nbytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/statm").read_text().split()
    return int(text[1]) * os.sysconf("SC_PAGE_SIZE")


def one_token_words() -> list[str]:
    from turbotx.serving.model_files import find_folder

    vocabulary = (find_folder("minilm") / "vocab.txt").read_text().split()
    return [word for word in vocabulary if re.fullmatch(r"[a-z]{3,9}", word)]


def serve_minilm(count: int, engines: list[str], load: float, threads: int) -> dict[str, Any]:
    """MiniLM with its weights, texts of 5 to 500 tokens: policies, and a peer."""
    lengths = uniform_lengths(5, 500)
    words, chooser = one_token_words(), random.Random(0)
    drawn = lengths(np.random.default_rng(0), count).tolist()
    texts = [" ".join(chooser.choices(words, k=n - 2)) for n in drawn]
    peer, service_ms = time_sentence_transformers(texts, threads)
    capacity = min(peer["offline_per_s"], peer["one_by_one_per_s"])
    rate = capacity * load
    trace = make_trace(poisson_gaps, lengths, rate_per_s=rate, count=count, seed=0)
    assert [r.length for r in trace] == drawn
    bodies = [json.dumps({"inputs": text}).encode() for text in texts]
    rows = [{"server": "sentence-transformers, one by one", **queue_of_one(trace, service_ms)}]
    print(peer, rows[-1], flush=True)
    for engine in engines:
        for policy in ("single", "fifo", "dp", "aged"):
            settings = {"policy": policy, "max_batch": 16, "max_batch_tokens": 4096,
                        "max_age_ms": 1e6, "timeout_ms": 1e6}  # fmt: skip
            with serving(engine=engine, threads=threads, settings=settings) as (host, port, _):
                found = asyncio.run(send_trace(host, port, trace, bodies)).summary()
            rows.append({"server": f"turbotx, {engine} model", "policy": policy, **found})
            print(rows[-1], flush=True)
    return {
        "rate_per_s": rate, "threads": threads, "sentence_transformers": peer, "rows": rows
    }  # fmt: skip


def simulate_minilm(count: int, engines: list[str], load: float, threads: int) -> dict[str, Any]:
    """The policies in simulated time, on MiniLM's measured costs: the machine disturbs only those.

    The trace is the same for all engines, its rate a part of what the first one's costs allow.
    """
    import torch

    from turbotx.serving.measure import measure_costs
    from turbotx.serving.model_files import load_model

    torch.set_num_threads(threads)
    lengths, rows, rate, tables = uniform_lengths(5, 500), [], 0.0, {}
    for engine in engines:
        model = load_model("minilm", backend=engine, max_length=LONGEST)
        limits = {"max_length": LONGEST, "max_batch": 16, "max_tokens": 4096}
        costs = measure_costs(model.engine, **limits, budget_ms=60_000.0)
        tables[engine] = costs.to_dict()
        drawn = lengths(np.random.default_rng(0), count).tolist()
        rate = rate or load * offline_capacity_per_s(drawn, costs)
        trace = make_trace(poisson_gaps, lengths, rate_per_s=rate, count=count, seed=0)
        for policy in ("single", "fifo", "dp", "aged"):
            queue = Scheduler(costs, POLICIES[policy](), max_batch_tokens=4096, max_queue=count)
            outcome = simulate(trace, queue)
            latency = outcome.latency_ms.tolist()
            found = Load([200] * count, latency, outcome.makespan_ms / 1e3).summary()
            rows.append({"server": f"simulated, {engine} model", "policy": policy, **found})
            print(rows[-1], flush=True)
    return {"rate_per_s": rate, "threads": threads, "costs": tables, "rows": rows}


def time_sentence_transformers(
    texts: list[str], threads: int
) -> tuple[dict[str, float], list[float]]:
    """Its encode on all texts at once (it sorts by length), and on one after the other."""
    import torch
    from sentence_transformers import SentenceTransformer

    from turbotx.serving.model_files import find_folder

    torch.set_num_threads(threads)
    model = SentenceTransformer(str(find_folder("minilm")), device="cpu")
    model.max_seq_length = LONGEST
    model.encode(texts[:4])
    begin = time.perf_counter()
    model.encode(texts, batch_size=16)
    offline = len(texts) / (time.perf_counter() - begin)
    took = []
    for text in texts:
        begin = time.perf_counter()
        model.encode(text)
        took.append((time.perf_counter() - begin) * 1e3)
    return {"offline_per_s": offline, "one_by_one_per_s": 1e3 / float(np.mean(took))}, took


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
    import matplotlib.pyplot as plt

    names = [
        " ".join(str(row[k]) for k in ("server", "policy", "load") if k in row) for row in rows
    ]
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(rows) + 1))
    axes.barh(names, [row.get("p99_ms", 0) for row in rows], color="#b9cfe4", label="p99")
    axes.barh(names, [row.get("p50_ms", 0) for row in rows], color="#2f5d8a", label="p50")
    for i, row in enumerate(rows):
        axes.text(row.get("p99_ms", 0), i, f" {row['per_s']:.1f}/s", va="center", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("latency, ms (throughput beside the bars)")
    axes.invert_yaxis()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        run_server(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment", choices=["sleep", "minilm", "minilm-costs", "overload"])
    parser.add_argument("--count", type=int, default=1500)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--load", type=float, default=0.9, help="of the peer's throughput")
    parser.add_argument("--engines", nargs="*", default=["eager", "turbotx"])
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.experiment == "sleep":
        result = compare_with_simulator(arguments.count)
    elif arguments.experiment == "overload":
        result = overload(arguments.seconds)
    else:
        run = serve_minilm if arguments.experiment == "minilm" else simulate_minilm
        result = run(arguments.count, arguments.engines, arguments.load, arguments.threads)
    result["load_average"] = os.getloadavg()  # above the cores: the timings are disturbed
    result["machine"] = platform.processor() or platform.machine()
    result["python"] = platform.python_version()
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        draw(result["rows"], arguments.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
