"""A stream of requests of random shapes, the first call included: total time of each engine.

In: engines and how many requests; batch 1 to 8, length 5 to 500, the same for all. Out: a line an
engine and benchmarks/results/stream.json, written after each engine; of turbotx also what it built
after the first ten shapes::

    python benchmarks/stream.py --engines turbotx eager --requests 200
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import turbotx
from turbotx.cli.bench.engines import ENGINES, make_engine
from turbotx.cli.bench.room import describe_machine
from turbotx.cli.inputs import huggingface_inputs
from turbotx.cli.models import Source

RESULTS = Path(__file__).parent / "results" / "stream.json"
BEFORE = 10  # shapes after which turbotx may build nothing


def draw_shapes(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Return (batch, length) of every request."""
    generator = random.Random(seed)
    return [(generator.randint(1, 8), generator.randint(5, 500)) for _ in range(count)]


def run_stream(engine: str, source: Source, requests: int, limit_s: float) -> dict[str, Any]:
    """Run one engine over the stream, stopping after `limit_s`; return seconds and counts."""
    loaded = source.load({"batch": 2, "seq": 16})
    inputs = []
    for batch, seq in draw_shapes(requests):
        given = huggingface_inputs(loaded.model, {"batch": batch, "seq": seq})
        inputs.append({**given, "attention_mask": torch.ones_like(given["attention_mask"])})
    if engine == "turbotx":
        loaded = type(loaded)(turbotx.optimize(loaded.model), loaded.args, loaded.kwargs)
    times: list[float] = []
    built = 0
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        began = time.perf_counter()
        run = make_engine(engine if engine != "turbotx" else "eager", loaded, Path(folder))
        made_s = time.perf_counter() - began
        for k, given in enumerate(inputs):
            if time.perf_counter() - began > limit_s:
                break
            start = time.perf_counter()
            run((), given)
            times.append(time.perf_counter() - start)
            if engine == "turbotx" and k == BEFORE - 1:
                built = loaded.model.stats()["kernel_builds"]
    found: dict[str, Any] = {
        "made_s": round(made_s, 3), "first_call_s": round(times[0], 3),
        "total_s": round(made_s + sum(times), 3), "median_ms": statistics.median(times) * 1e3,
        "requests": len(times), "seconds": [round(t, 5) for t in times],
    }  # fmt: skip
    if engine == "turbotx":
        found["built_after_ten"] = loaded.model.stats()["kernel_builds"] - built
        found["captures"] = loaded.model.stats()["captures"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--engines", nargs="+", default=["turbotx", "eager"], choices=ENGINES)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--limit", type=float, default=3600.0, metavar="SECONDS")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    for engine in options.engines:
        found = run_stream(engine, Source(options.model), options.requests, options.limit)
        record.setdefault("models", {}).setdefault(options.model, {})[engine] = found
        record["machine"] = describe_machine(options.threads)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        print(
            f"{options.model} {engine}: {found['total_s']:.1f} s for {found['requests']} requests, "
            f"first call {found['made_s'] + found['first_call_s']:.1f} s, "
            f"median {found['median_ms']:.1f} ms {found.get('built_after_ten', '')}",
            flush=True,
        )


if __name__ == "__main__":
    main()
