"""The server of a load test, in a process of its own.

In: which engine, which settings. Out: host, port and process id of a server that is ready::

    with serving(engine="sleep", scale=8, settings={"policy": "fifo"}) as (host, port, pid): ...
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from turbotx.cli.serve import wait_briefly
from turbotx.serving import CostTable
from turbotx.serving.token_costs import BatchCosts, TokenCosts

LONGEST = 512


def sleeping_costs(scale: float) -> CostTable:
    """The toy table of the simulations, ``scale`` times as slow."""
    return CostTable.from_function(lambda n, b: scale * (4 + 0.022 * n * b), 100, 20)


@contextmanager
def serving(**options: Any) -> Iterator[tuple[str, int, int]]:
    """Options: engine (sleep, eager, turbotx), settings; scale; padding, threads, costs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, json.dumps({**options, "port": port})]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path[1:]])}
    wait_briefly(environment)  # as `turbotx serve` does
    process = subprocess.Popen(command, env=environment)
    try:
        wait_ready(f"http://127.0.0.1:{port}/ready", process)
        yield "127.0.0.1", port, process.pid
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def costs_of(table: dict[str, Any]) -> BatchCosts:
    """What ``to_dict`` of costs has made, with padding or without."""
    if "tokens" in table:
        return TokenCosts(*(table[k] for k in ("tokens", "cost_ms", "square_ms", "max_length")))
    return CostTable(table["lengths"], table["batches"], table["cost_ms"])


def wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """Raises RuntimeError where the process ends, or is not ready within five minutes."""
    for _ in range(6000):
        if process.poll() is not None:
            raise RuntimeError(f"the server exited with {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise RuntimeError("the server was not ready within five minutes")


def run_server(options: dict[str, Any]) -> None:
    from sleep_engine import SleepEngine

    from turbotx.serving.engine import Head
    from turbotx.serving.logs import log_as_json
    from turbotx.serving.model_files import LoadedModel, ModelInfo, find_folder, load_model
    from turbotx.serving.server import run
    from turbotx.serving.settings import Settings
    from turbotx.serving.tokenizer_files import load_tokenizer

    log_as_json("warning")
    engine = options["engine"]
    if engine == "sleep":
        costs = sleeping_costs(options["scale"])
        sleeping = SleepEngine(costs, head=Head("embedding"))
        info = ModelInfo("sleep", "", "float32", costs.max_length, 8, sleeping.head)
        tokenizer = load_tokenizer(find_folder("minilm"))
        tokenizer.max_length = costs.max_length
        model = LoadedModel(sleeping, tokenizer, info, costs)
    else:
        import torch

        torch.set_num_threads(options["threads"])
        model = load_model("minilm", backend=engine, padding=options["padding"], max_length=LONGEST)
        costs = costs_of(options["costs"])
    settings = Settings(**{"cache_nbytes": 0, "coalesce": False, **options["settings"]})
    run(model, settings, host="127.0.0.1", port=options["port"], costs=costs)


if __name__ == "__main__":
    run_server(json.loads(sys.argv[1]))
