"""Clients beside others, on `turbotx serve minilm` itself; and a server that is killed.

In: how long each row takes. Out: rows of what a normal client, asking single short texts and
`/health`, meets meanwhile; the command runs in a process of its own, so do the others' clients::

    python benchmarks/serving.py clients --seconds 20
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from http_load import Client
from serving_process import stop, wait_ready
from slices import Slices

WORDS = "retrieval augmented generation splits documents the memory planner of a cat on its mat"
RATE = 10.0  # requests a second of the normal client, to each of its two paths
COMMAND = "from turbotx.cli import main; main()"


def measure_clients(slices: Slices, seconds: float) -> list[dict[str, Any]]:
    """The rows of all three experiments; what was measured before is read back."""
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for name in OTHERS:
            row = slices.measure(f"beside {name}", lambda n=name: beside(n, seconds, folder))
            rows.append({"beside": name, **row})
        started = slices.measure("kill and restart", lambda: kill_and_restart(folder))
    alone = rows[0]
    attacked = [row for row in rows if row["beside"] not in ("nobody", "an indexer")]
    checks = {
        "beside attackers p99 of /embed and /health at most 250 ms": all(
            row["embed_p99_ms"] <= 250 and row["health_p99_ms"] <= 250 for row in attacked
        ),
        "beside attackers memory below 1.5 of idle": all(
            row["peak_resident_nbytes"] < 1.5 * alone["idle_resident_nbytes"] for row in attacked
        ),
        "everybody normal is answered": all(row["not_answered"] == 0 for row in rows),
        "from SIGKILL to ready within 5 s": started["ready_s"] <= 5,
    }
    slices.write(rows=rows, restart=started, checks=checks)
    return rows


def beside(name: str, seconds: float, folder: str) -> dict[str, Any]:
    """A normal client for so long, while the others of that name do what they do."""
    with serving_minilm(folder) as (port, pid):
        asyncio.run(_ask_normally(port, 1.0))  # the first answers pay for what is made once
        idle, indexed = resident_nbytes(pid), multiprocessing.Value("d", 0.0)
        others = [
            multiprocessing.Process(target=run_other, args=(client, port, indexed), daemon=True)
            for client in OTHERS[name]
        ]
        for other in others:
            other.start()
        time.sleep(1.0 if others else 0.0)
        begin, before = time.perf_counter(), indexed.value
        found = asyncio.run(_ask_normally(port, seconds))
        per_s = (indexed.value - before) / (time.perf_counter() - begin)
        for other in others:
            other.kill()
            other.join()
        peak = resident_nbytes(pid, "VmHWM")
    found.update({"indexed_per_s": per_s} if per_s else {})
    return {**found, "idle_resident_nbytes": idle, "peak_resident_nbytes": peak}


def run_other(client: Callable[..., Any], port: int, indexed: Any) -> None:
    asyncio.run(client(port, indexed))


async def _ask_normally(port: int, seconds: float) -> dict[str, Any]:
    """Open loop: RATE a second to `/embed`, each text another, and as many to `/health`."""
    client, chooser = Client("127.0.0.1", port), random.Random(time.monotonic_ns())
    took: dict[str, list[float]] = {"embed": [], "health": []}
    failed = 0

    async def ask(path: str, body: bytes | None, due: float) -> None:
        nonlocal failed
        try:
            status = await asyncio.wait_for(client.send(f"/{path}", body), 30)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
            status = 0
        failed += status != 200
        took[path].append((time.perf_counter() - due) * 1e3)

    begin, tasks = time.perf_counter(), []
    for k in range(int(seconds * RATE)):
        due = begin + k / RATE
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        body = json.dumps({"inputs": make_text(chooser, 8)}).encode()
        tasks += [asyncio.create_task(ask("embed", body, due)),
                  asyncio.create_task(ask("health", None, due))]  # fmt: skip
    await asyncio.gather(*tasks)
    client.close()
    quantiles = {
        f"{path}_p{q}_ms": float(np.percentile(took[path], q)) for path in took for q in (50, 99)
    }
    return {**quantiles, "asked": len(tasks), "not_answered": failed}


def make_text(chooser: random.Random, words: int) -> str:
    return " ".join(chooser.choices(WORDS.split(), k=words)) + f" {chooser.random()}"


# --- the others -----------------------------------------------------------------------------------


async def index(port: int, indexed: Any) -> None:
    """Batches of 100 chunks of 20 to 150 words, one after the other; those refused come again."""
    client, chooser = Client("127.0.0.1", port), random.Random(0)
    while True:
        texts = [make_text(chooser, chooser.randint(20, 150)) for _ in range(100)]
        body = json.dumps({"inputs": texts, "truncate": True}).encode()
        while await client.send("/embed", body) != 200:
            await asyncio.sleep(0.1)
        indexed.value += len(texts)


def sending(path: str, make: Callable[[], bytes], connections: int, headers: str = "") -> Any:
    """A client that sends one body for ever over so many connections, whatever comes back."""

    async def attack(port: int, indexed: Any) -> None:
        body = make()

        async def send() -> None:
            client = Client("127.0.0.1", port)
            while True:
                with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                    await client.send(path, body, headers)
                await asyncio.sleep(0)

        await asyncio.gather(*(send() for _ in range(connections)))

    return attack


async def say_nothing(port: int, indexed: Any) -> None:
    """Connections that send half a header, or half a body, and are opened anew where closed."""
    halves = (
        b"",
        b"POST /embed HT",
        b"POST /embed HTTP/1.1\r\nhost: a\r\ncontent-length: 900\r\n\r\n{",
    )

    async def hold(k: int) -> None:
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(halves[k % len(halves)])
                await reader.read()
            await asyncio.sleep(0.1)

    await asyncio.gather(*(hold(k) for k in range(900)))


def nested_ids() -> bytes:
    return b'{"inputs":[' + b"[1]," * 2_000_000 + b"[1]]}"


def long_text() -> bytes:
    return json.dumps({"inputs": f"{WORDS} " * 90_000, "truncate": True}).encode()


def tokens_of_much() -> bytes:
    return json.dumps({"inputs": f"{WORDS} " * 18_000}).encode()


def tokens_of_some() -> bytes:
    return json.dumps({"inputs": f"{WORDS} " * 2_000}).encode()


def many_texts() -> bytes:
    return json.dumps({"inputs": [f"{k} {WORDS} " * 50 for k in range(256)], "truncate": True}).encode()  # fmt: skip  # noqa: E501


OTHERS: dict[str, list[Any]] = {
    "nobody": [],
    "an indexer": [index],
    "8 MB of [1],[1],...": [sending("/embed", nested_ids, 4)],
    "texts of 8 MB": [sending("/embed", long_text, 4)],
    "/tokenize of 1.6 MB": [sending("/tokenize", tokens_of_much, 4)],
    "/tokenize of 30,000 tokens": [sending("/tokenize", tokens_of_some, 4)],
    "/tokenize of 256 texts": [sending("/tokenize", many_texts, 4)],
    "8 MB in 8 KB of gzip": [
        sending("/embed", lambda: gzip.compress(long_text()), 4, "content-encoding: gzip\r\n")
    ],
    "900 connections that say nothing": [say_nothing],
}


# --- kill and restart -----------------------------------------------------------------------------


def kill_and_restart(folder: str) -> dict[str, Any]:
    """From SIGKILL to the first answer of the next process, with what the first one kept."""
    with serving_minilm(folder) as (port, pid):
        os.kill(pid, signal.SIGKILL)
        begin = time.perf_counter()
    with serving_minilm(folder) as (port, _):
        ready_s = time.perf_counter() - begin
        found = asyncio.run(_ask_normally(port, 1.0))
    return {"ready_s": ready_s, "first_answers_p99_ms": found["embed_p99_ms"]}


@contextlib.contextmanager
def serving_minilm(folder: str) -> Iterator[tuple[int, int]]:
    """The command itself, its caches in the folder; yields its port and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "TURBOTX_CACHE_DIR": folder, "PYTHONPATH": "."}
    command = [sys.executable, "-c", COMMAND, "serve", "minilm", "--log-level", "error",
               "--port", str(port)]  # fmt: skip
    process = subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[1])
    try:
        wait_ready(f"http://127.0.0.1:{port}/ready", process)
        yield port, process.pid
    finally:
        stop(process)


def resident_nbytes(pid: int, name: str = "VmRSS") -> int:
    """What a process has in memory, or with VmHWM the most it ever had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
