"""The server's own work: CPU microseconds of its process, with models that cost next to nothing.

In: how many clients. Out: a line a row and benchmarks/results/serving_host.json: CPU us of the
event loop's thread and of all others, for each text (`/embed`, `/v1/embeddings`) and for each step
and token of `/v1/completions`, as events and whole; the least of several rounds. Milliseconds are
of the clients' clock, for a quiet machine::

    python benchmarks/serving_host.py --clients 1 8 16 32 --rounds 5
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "serving_host.json"
sys.path[:0] = [str(HERE.parent), str(HERE)]

from generation import save_model  # noqa: E402
from http_load import Client  # noqa: E402
from serving_process import stop, wait_ready  # noqa: E402

MODES = "cls+max+mean+mean_sqrt_len_tokens+weightedmean+lasttoken"  # 6 vectors of 128: 768 numbers
LETTERS = "abcdefghijklmnopqrstuvwxyz "
MADE = 64  # tokens of each text that is generated
STEPS, BATCHES = "turbotx_step_seconds_count", "te_batch_next_size_count"
Task = Callable[[Client, int], Awaitable[None]]


def save_encoder(folder: Path) -> None:
    """Write a BERT of one layer, with a tokenizer of bytes."""
    import transformers

    save_model(folder, 1)  # for its tokenizer
    config = transformers.BertConfig(
        vocab_size=50_257, hidden_size=128, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, pad_token_id=0,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)


def save_decoder(folder: Path) -> None:
    """Write a GPT-2 of one layer, 8 wide, with logits over the first 512 tokens."""
    import transformers

    save_model(folder, 1)  # for its tokenizer
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=512)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


@contextlib.contextmanager
def serving(folder: str, root: str, *options: str) -> Iterator[tuple[int, int]]:
    """Run `turbotx serve` of the tree at `root` on one thread of kernels; yield port and process
    id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "turbotx", "serve", folder, "--port", str(port),
               "--log-level", "warning", *options]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, cwd=root)
    try:
        wait_ready(f"http://127.0.0.1:{port}/ready", process)
        yield port, process.pid
    finally:
        stop(process)


def cpu_us(pid: int) -> tuple[float, float]:
    """Return CPU us of a process so far: of the event loop's thread, the first, and of all
    others."""
    loop = others = 0.0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has ended
            used = int((task / "schedstat").read_text().split()[0]) / 1e3
            loop, others = (used, others) if task.name == str(pid) else (loop, others + used)
    return loop, others


async def run(port: int, count: int, clients: int, task: Task) -> float:
    """Do a task `count` times, so many at a time; return the seconds that it took."""
    client, waiting = Client("127.0.0.1", port), iter(range(count))

    async def one() -> None:
        for k in waiting:
            await task(client, k)

    begin = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    took_s = time.perf_counter() - begin
    client.close()
    return took_s


async def count(port: int, name: str) -> float:
    """Return a figure of the server's metrics."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    answer = (await reader.read()).decode()
    writer.close()
    found = re.search(rf"(?m)^{name} (\S+)", answer)
    assert found is not None, answer
    return float(found[1])


def spend(
    port: int, pid: int, counter: str, texts: int, clients: int, task: Task
) -> tuple[float, float, float, float]:
    """Ask for texts; return by how much a counter of the server's rose, the CPU us of its event
    loop and of its other threads, and the seconds."""
    counted, before = asyncio.run(count(port, counter)), cpu_us(pid)
    took_s = asyncio.run(run(port, texts, clients, task))
    loop, others = (b - a for a, b in zip(before, cpu_us(pid), strict=True))
    return asyncio.run(count(port, counter)) - counted, loop, others, took_s


# --- texts to vectors ---


def embedding(path: str) -> Task:
    """Return the task of asking a path for the vector of one text."""
    chooser = random.Random(0)
    texts = ["".join(chooser.choices(LETTERS, k=chooser.randint(5, 60))) for _ in range(512)]
    name = "input" if path.startswith("/v1") else "inputs"
    bodies = [json.dumps({name: text, **({"model": "m"} if name == "input" else {})}).encode()
              for text in texts]  # fmt: skip

    async def ask(client: Client, k: int) -> None:
        assert await client.send(path, bodies[k % len(bodies)]) == 200

    return ask


def measure_texts(port: int, pid: int, path: str, clients: int, texts: int) -> dict[str, Any]:
    batches, loop, others, took_s = spend(port, pid, BATCHES, texts, clients, embedding(path))
    return {
        "what": path, "clients": clients, "loop_us": loop / texts, "others_us": others / texts,
        "us": (loop + others) / texts, "ms": took_s / texts * clients * 1e3,
        "rows": texts / batches,
    }  # fmt: skip


# --- prompts to tokens ---


def completion(stream: bool) -> Task:
    """Return the task of asking for MADE tokens, as events or whole."""
    body = json.dumps({"prompt": list(range(40)), "max_tokens": MADE, "ignore_eos": True,
                       "temperature": 0, "stream": stream}).encode()  # fmt: skip

    async def ask(client: Client, k: int) -> None:
        if not stream:
            assert await client.send("/v1/completions", body) == 200
            return
        reader, writer = await asyncio.open_connection(client.host, client.port)
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.read()
        writer.close()
        assert answer.startswith(b"HTTP/1.1 200") and b"[DONE]" in answer, answer[:500]

    return ask


def measure_tokens(port: int, pid: int, stream: bool, clients: int, texts: int) -> dict[str, Any]:
    steps, loop, others, took_s = spend(port, pid, STEPS, texts, clients, completion(stream))
    return {
        "what": "events" if stream else "whole", "clients": clients, "loop_us": loop / steps,
        "others_us": others / steps, "us": (loop + others) / steps,
        "us_per_token": (loop + others) / (texts * MADE), "ms": took_s / steps * 1e3,
        "rows": texts * MADE / steps,
    }  # fmt: skip


# --- rows ---


def least(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the round with the least CPU time, rounded."""
    best = min(rounds, key=lambda r: r["us"])
    return {k: round(v, 3 if k == "ms" else 1) if isinstance(v, float) else v
            for k, v in best.items()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=800, help="a round")
    parser.add_argument("--only", choices=["texts", "tokens"])
    parser.add_argument(
        "--tree", nargs="+", default=[str(HERE.parent)],
        help="checkouts whose servers are measured in turns; the first is written to the results",
    )  # fmt: skip
    options = parser.parse_args()
    kinds: dict[str, Any] = {
        "texts": (save_encoder, ("--pooling", MODES, "--cache-nbytes", "0"), measure_texts,
                  ("/embed", "/v1/embeddings")),
        "tokens": (save_decoder, ("--task", "generate", "--max-sequences", "32"), measure_tokens,
                   (True, False)),
    }  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {tree: [] for tree in options.tree}
    for kind in [options.only] if options.only else kinds:
        save, arguments, measure, whats = kinds[kind]
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            save(Path(folder))
            servers = [stack.enter_context(serving(folder, t, *arguments)) for t in options.tree]
            for what in whats:
                for clients in options.clients:
                    count = options.texts if kind == "texts" else max(2 * clients, 8)
                    rounds: dict[str, list[Any]] = {tree: [] for tree in options.tree}
                    for _ in range(1 + options.rounds):  # the first one makes what is made once
                        for tree, (port, pid) in zip(options.tree, servers, strict=True):
                            rounds[tree].append(measure(port, pid, what, clients, count))
                    for tree in options.tree:
                        found[tree].append(least(rounds[tree][1:]))
                        print(tree if len(options.tree) > 1 else "", json.dumps(found[tree][-1]),
                              flush=True)  # fmt: skip
    if options.only is None:
        from turbotx.cli.bench.runner import describe_machine

        rows = found[options.tree[0]]
        RESULTS.write_text(
            json.dumps({"machine": describe_machine(1), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
