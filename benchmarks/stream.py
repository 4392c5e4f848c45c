"""A stream of requests of random shapes, the first call included: total time of each engine.

In: engines and how many requests; batch 1 to 8, length 5 to 500, the same for all. Out: a line an
engine and benchmarks/results/stream.json, written after each engine, so that the others can follow
later. Each engine has a process of its own, which is stopped at the limit and recorded as such::

    python benchmarks/stream.py --engines turbotx eager --requests 200 --limit 240
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from turbotx.cli.bench.engines import ENGINES, make_engine
from turbotx.cli.bench.runner import describe_machine
from turbotx.cli.bench.worker import explain_error
from turbotx.cli.inputs import EXAMPLE_SHAPE, huggingface_inputs
from turbotx.cli.models import Source

RESULTS = Path(__file__).parent / "results" / "stream.json"
BEFORE = 10  # shapes after which turbotx may build nothing


def draw_shapes(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Return (batch, length) of every request."""
    generator = random.Random(seed)
    return [(generator.randint(1, 8), generator.randint(5, 500)) for _ in range(count)]


# --- an engine's process ------------------------------------------------------------------


def serve_stream(engine: str, source: Source, requests: int) -> None:
    """Run one engine over the stream; print a line of JSON for the engine and for each request."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print what they like

    def reply(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=replies, flush=True)

    loaded = source.load(EXAMPLE_SHAPE)
    inputs = []
    for batch, seq in draw_shapes(requests):
        given = huggingface_inputs(loaded.model, {"batch": batch, "seq": seq})
        inputs.append({**given, "attention_mask": torch.ones_like(given["attention_mask"])})
    builds = count_builds(engine)
    reply({"loaded": True})
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        try:
            began = time.perf_counter()
            run = make_engine(engine, loaded, Path(folder))
            reply({"made_s": time.perf_counter() - began})
            for given in inputs:
                start = time.perf_counter()
                run((), given)
                reply({"s": time.perf_counter() - start, "builds": builds()})
        except Exception as error:  # shown in the engine's place
            reply({"error": explain_error(error)})


def count_builds(engine: str) -> Any:
    """Return a function that counts what an engine has compiled so far in this process."""
    if engine.startswith("compile"):
        from torch._dynamo.utils import counters

        return lambda: counters["stats"]["unique_graphs"]
    if engine != "turbotx":
        return lambda: 0
    from turbotx.engine.engine import Engine

    engines: list[Engine] = []
    made = Engine.__init__

    def keep(self: Engine, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        engines.append(self)

    Engine.__init__ = keep  # type: ignore[method-assign]
    # A capture is counted too: it takes as long as a build.
    return lambda: sum(e.stats()["kernel_builds"] + e.stats()["captures"] for e in engines)


# --- the process that asks ----------------------------------------------------------------


def run_stream(engine: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return seconds and counts of one engine in a fresh process with an empty kernel cache.

    The limit counts from when the model is loaded and holds even within a call that never ends.
    """
    command = [sys.executable, __file__, "--serve", engine, "--model", options.model]
    command += ["--requests", str(options.requests), "--threads", str(options.threads)]
    with tempfile.TemporaryDirectory() as cache:
        settings = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        settings |= {"TURBOTX_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=settings
        )
        try:
            return _listen(process, options.limit)
        finally:
            process.kill()
            process.wait()


def _listen(process: subprocess.Popen[str], limit_s: float) -> dict[str, Any]:
    """Gather an engine's replies until it ends or the limit is over."""
    found: dict[str, Any] = {}
    times: list[float] = []
    builds: list[int] = []
    assert process.stdout is not None
    for line in process.stdout:
        reply = json.loads(line)
        if "loaded" in reply:
            timer = threading.Timer(limit_s, process.kill)
            timer.daemon = True
            timer.start()
        elif "s" in reply:
            times.append(reply["s"])
            builds.append(reply["builds"])
        else:
            found |= reply
    code = process.wait()
    if code < 0:
        found["stopped_at_s"] = limit_s
    elif code > 0:
        found.setdefault("error", f"its process ended with code {code}")
    found["requests"] = len(times)
    if times:
        found |= {
            "first_call_s": round(found["made_s"] + times[0], 3),
            "total_s": round(found["made_s"] + sum(times), 3),
            "median_ms": round(statistics.median(times) * 1e3, 3),
            "builds": builds[-1],
            "built_after_ten": builds[-1] - builds[min(BEFORE, len(builds)) - 1],
            "seconds": [round(t, 5) for t in times],
        }
    return found


def describe(engine: str, found: dict[str, Any], requests: int) -> str:
    """Return a line for people."""
    if "error" in found and not found["requests"]:
        return f"{engine}: {found['error']}"
    if not found["requests"]:
        return f"{engine}: no request answered within {found['stopped_at_s']:.0f} s"
    done = f"{found['total_s']:.1f} s for {found['requests']} of {requests} requests"
    stopped = f", stopped at {found['stopped_at_s']:.0f} s" if "stopped_at_s" in found else ""
    return (
        f"{engine}: {done}{stopped}, first call {found['first_call_s']:.1f} s, median "
        f"{found['median_ms']:.1f} ms, built {found['builds']}, {found['built_after_ten']} of "
        f"them after ten shapes {found.get('error', '')}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm")
    engines = [e for e in ENGINES if not e.startswith("floor")]
    parser.add_argument("--engines", nargs="+", default=engines, choices=ENGINES)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--limit", type=float, default=240.0, metavar="SECONDS", help="an engine")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--serve", metavar="ENGINE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.serve:
        serve_stream(options.serve, Source(options.model), options.requests)
        return
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    for engine in options.engines:
        found = run_stream(engine, options)
        record.setdefault("models", {}).setdefault(options.model, {})[engine] = found
        record["machine"] = describe_machine(options.threads)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        print(options.model, describe(engine, found, options.requests), flush=True)


if __name__ == "__main__":
    main()
