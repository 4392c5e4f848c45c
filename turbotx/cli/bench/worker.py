"""Worker: the process of one engine; reads inputs and writes milliseconds, one JSON line each.

In: the engine, the model and the threads as one JSON argument; then one line per request. Out: one
line per reply; everything else that is printed goes to standard error::

    {"inputs": "inputs.pt", "count": 8, "warm": 3, "streams": 1}
    ->  {"times_ms": [4.31, 4.29, ...], "wall_ms": 34.4}
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from turbotx.cli.bench.engines import make_engine
from turbotx.cli.inputs import EXAMPLE_SHAPE
from turbotx.cli.models import Source
from turbotx.errors import kind_and_line

TURN_S = 0.4  # limits turns with long calls, so that engines alternate


def serve(engine: str, source: Source, threads: int) -> None:
    """Answer requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print anything
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():

        def reply(value: dict[str, Any]) -> None:
            replies.write(json.dumps(value) + "\n")
            replies.flush()

        try:
            loaded = source.load(EXAMPLE_SHAPE)
            began = time.perf_counter()
            run = make_engine(engine, loaded, Path(folder))
            reply({"ready_s": time.perf_counter() - began})
            for line in sys.stdin:
                reply(answer(run, json.loads(line)))
        except Exception as error:  # reported instead of times
            reply({"error": explain_error(error)})


def explain_error(error: BaseException) -> str:
    """Return the first line of the root cause: exporters wrap it in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return kind_and_line(error)


def answer(run: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Run on the inputs of one request, after `warm` uncounted calls."""
    args, kwargs = torch.load(request["inputs"], weights_only=False)
    for _ in range(request["warm"]):
        run(args, kwargs)

    def stream(_: int) -> list[float]:
        times: list[float] = []
        with torch.no_grad():  # grad mode is per thread
            while len(times) < request["count"] and (len(times) < 2 or sum(times) < TURN_S * 1e3):
                start = time.perf_counter()
                run(args, kwargs)
                times.append((time.perf_counter() - start) * 1e3)
        return times

    streams = request["streams"]
    begin = time.perf_counter()
    if streams == 1:
        times = stream(0)
    else:
        with ThreadPoolExecutor(streams) as pool:
            times = [t for found in pool.map(stream, range(streams)) for t in found]
    return {"times_ms": times, "wall_ms": (time.perf_counter() - begin) * 1e3}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    weights = Path(given["weights"]) if given["weights"] else None
    source = Source(given["model"], given["dtype"], weights, given["quantize"])
    serve(given["engine"], source, int(given["threads"]))
