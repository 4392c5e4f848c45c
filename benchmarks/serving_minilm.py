"""MiniLM with its real weights behind `turbotx serve`, with padding and without, and its peers.

In: how many texts, at what load. Out: rows of requests a second and latencies::

    python benchmarks/serving.py minilm         # every policy, PyTorch eager, sentence-transformers
    python benchmarks/serving.py padding        # the default with padding and without it
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from http_load import Load, send_trace
from serving_process import LONGEST, costs_of, serving
from slices import Slices

from turbotx.serving import POLICIES, Request, Scheduler
from turbotx.serving.simulation import offline_capacity_per_s, simulate
from turbotx.serving.token_policies import TOKEN_POLICIES
from turbotx.serving.traces import (
    Lengths,
    lognormal_lengths,
    make_trace,
    poisson_gaps,
    uniform_lengths,
)

UNLIMITED = {"max_age_ms": 1e6, "timeout_ms": 1e6}
SERVED = (
    ("turbotx", "padded", ("single", "fifo", "dp", "aged")),
    ("turbotx", "packed", ("fifo", "aged")),
    ("eager", "padded", ("single", "fifo")),
)
MIXTURES: dict[str, Lengths] = {
    "U(5, 500)": uniform_lengths(5, 500),
    "lognormal": lognormal_lengths(60, 1.0, 500),
}


def serve_minilm(slices: Slices, count: int, load: float, threads: int) -> None:
    """MiniLM, texts of 5 to 500 tokens: every policy over HTTP, and the peers: PyTorch eager in
    the same server, sentence-transformers.

    Two arrivals of the same texts: Poisson at ``load`` of what the peer can do, for latency; and
    all at once, for throughput. Beside them the simulator, on the costs measured at the start.
    """
    lengths = uniform_lengths(5, 500)
    texts = make_texts(count, lengths)
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
    for engine, padding, policies in SERVED:
        served = Served(engine, padding, threads)
        table = slices.measure(f"costs, {served.name}", served.measure_costs)
        for policy in policies:
            settings = {"policy": policy, "max_batch": 16, "max_batch_tokens": 4096}
            row = slices.measure(
                f"{served.name}, {policy}",
                lambda s=served, m=settings, t=table: s.run(m, t, trace, texts),
            )
            made = (TOKEN_POLICIES if padding == "packed" else POLICIES)[policy]()
            queue = Scheduler(costs_of(table), made, max_batch_tokens=4096, max_queue=count)
            simulated = simulate(trace, queue)
            rows.append({
                "server": f"turbotx serve, {served.name} model", "policy": policy, **row,
                "simulated_p50_ms": simulated.percentile_ms(50),
                "simulated_p99_ms": simulated.percentile_ms(99),
            })  # fmt: skip
    slices.write(rate_per_s=rate, rows=rows)


def compare_padding(slices: Slices, count: int, load: float, threads: int) -> None:
    """The default with padding and without it, on the same texts at the same times.

    All at once, then Poisson at ``load`` of what full padded batches could do by the costs measured
    at the start.
    """
    rows = []
    kinds = {padding: Served("turbotx", padding, threads) for padding in ("padded", "packed")}
    tables = {
        padding: slices.measure(f"costs, {padding}", served.measure_costs)
        for padding, served in kinds.items()
    }
    for name, lengths in MIXTURES.items():
        drawn = lengths(np.random.default_rng(0), count).tolist()
        rate = load * offline_capacity_per_s(drawn, costs_of(tables["padded"]))
        trace = make_trace(poisson_gaps, lengths, rate_per_s=rate, count=count, seed=0)
        texts = make_texts(count, lengths)
        for padding, served in kinds.items():
            row = slices.measure(
                f"{name}, {padding}",
                lambda s=served, t=tables[padding], r=trace, x=texts: s.run({}, t, r, x),
            )
            rows.append({"server": padding, "lengths": name, "rate_per_s": rate, **row})
    padded, packed = rows[0], rows[1]
    checks = {
        "U(5, 500) all at once at least 1.25 x padded": packed["all_at_once_per_s"]
        >= 1.25 * padded["all_at_once_per_s"],
        "U(5, 500) no worse p99": packed["p99_ms"] <= padded["p99_ms"],
    }
    slices.write(rows=rows, checks=checks)


@dataclass(frozen=True)
class Served:
    """MiniLM behind `turbotx serve`: what computes it, with padding or without."""

    engine: str
    padding: str
    threads: int

    @property
    def name(self) -> str:
        return f"{self.engine} packed" if self.padding == "packed" else self.engine

    def run(
        self, settings: dict[str, Any], table: dict[str, Any], trace: list[Request],
        texts: list[str],
    ) -> dict[str, Any]:  # fmt: skip
        """All texts at once, then as in the trace, over HTTP."""
        bodies = [json.dumps({"inputs": text}).encode() for text in texts]
        burst = [Request(r.key, r.length, 0.0) for r in trace]
        options = {"engine": self.engine, "padding": self.padding, "threads": self.threads}
        limits = {**settings, **UNLIMITED}
        with serving(**options, costs=table, settings=limits) as (host, port, _):
            at_once = asyncio.run(send_trace(host, port, burst, bodies)).summary()
            found = asyncio.run(send_trace(host, port, trace, bodies)).summary()
        for one in (at_once, found):
            if one["answered"] != len(trace):
                raise RuntimeError(f"not every text was answered: {one}")
        return {**found, "all_at_once_per_s": at_once["per_s"]}

    def measure_costs(self) -> dict[str, Any]:
        import torch

        from turbotx.serving.measure import load_or_measure
        from turbotx.serving.model_files import load_model

        torch.set_num_threads(self.threads)
        engine = load_model(
            "minilm", backend=self.engine, padding=self.padding, max_length=LONGEST
        ).engine
        limits = {"max_length": LONGEST, "max_batch": 32, "max_tokens": 16_384}
        return load_or_measure(None, engine, packed=self.padding == "packed", **limits).to_dict()


def make_texts(count: int, lengths: Lengths) -> list[str]:
    """Texts of so many tokens, those of a trace of seed 0, made of words that are one each."""
    from turbotx.serving.model_files import find_folder

    vocabulary = (find_folder("minilm") / "vocab.txt").read_text().split()
    words = [word for word in vocabulary if re.fullmatch(r"[a-z]{3,9}", word)]
    chooser = random.Random(0)
    drawn = lengths(np.random.default_rng(0), count).tolist()
    return [" ".join(chooser.choices(words, k=max(n - 2, 1))) for n in drawn]


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
