"""Serving texts: clients at once against one after another, by the HTTP server itself.

In: a shape of a model (random weights, one token a byte), how many clients, what they ask. Out: a
line a row and benchmarks/results/generation.json: tokens a second, ms to the first token and
between tokens (median and 99th percentile). The server is a process of its own; prompts of 8 to 300
tokens, 32 to 96 tokens made, the same ones in every row::

    python benchmarks/generation.py --clients 1 8 --requests 32
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

try:  # what Starlette's test client uses
    import httpx2 as httpx
except ImportError:
    import httpx

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "generation.json"
VOCABULARY = 50_257
sys.path[:0] = [str(HERE.parent), str(HERE)]


def save_model(folder: Path, layers: int) -> None:
    """Write GPT-2-small's shape, fewer layers if told so, with a tokenizer of bytes."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {f"<{i}>": i for i in range(len(alphabet), VOCABULARY)}  # a text for every token
    bytes_alone = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)} | words, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone, model_max_length=1024
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=layers, vocab_size=VOCABULARY)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


async def ask(client: Any, url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send one request; return its tokens and when each piece came, in s from its beginning."""
    begin, times, tokens = time.perf_counter(), [], 0
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                times += [time.perf_counter() - begin] if event["choices"] else []
                tokens = (event["usage"] or {}).get("completion_tokens", tokens)
    return {"times": times, "tokens": tokens}


async def measure(url: str, bodies: list[dict[str, Any]], clients: int) -> dict[str, Any]:
    """Run all requests, so many at a time."""
    waiting = list(bodies)
    found: list[dict[str, Any]] = []
    async with httpx.AsyncClient(timeout=600) as client:

        async def one() -> None:
            while waiting:
                found.append(await ask(client, url, waiting.pop(0)))

        begin = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        took_s = time.perf_counter() - begin
    first = [r["times"][0] * 1e3 for r in found]
    between = np.concatenate([np.diff(r["times"]) for r in found]) * 1e3
    tokens = sum(r["tokens"] for r in found)
    return {
        "clients": clients, "requests": len(found), "tokens": tokens,
        "tokens_per_s": round(tokens / took_s, 1),
        "first_ms": [round(float(np.percentile(first, q)), 1) for q in (50, 99)],
        "between_ms": [round(float(np.percentile(between, q)), 1) for q in (50, 99)],
    }  # fmt: skip


def requests(count: int) -> list[dict[str, Any]]:
    """The same prompts every time."""
    rng = np.random.default_rng(0)
    return [
        {"prompt": rng.integers(0, 256, n).tolist(), "max_tokens": int(m), "ignore_eos": True,
         "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        for n, m in zip(rng.integers(8, 300, count), rng.integers(32, 96, count), strict=True)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the server")
    parser.add_argument("--rounds", type=int, default=2, help="of which the faster is kept")
    options = parser.parse_args()
    from turbotx.cli.bench.runner import describe_machine

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, bodies = f"http://127.0.0.1:{port}", requests(options.requests)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), options.layers)
        server = subprocess.Popen(
            [sys.executable, "-m", "turbotx", "serve", folder, "--task", "generate", "--port",
             str(port), "--dtype", options.dtype, "--log-level", "warning"],
            env={
                **os.environ,
                "PYTHONPATH": str(HERE.parent),
                "OMP_NUM_THREADS": str(options.threads),
            },
        )  # fmt: skip
        try:
            wait(url, server)
            asyncio.run(measure(url, bodies, max(options.clients)))  # plans of these shapes
            rows = []
            for clients in options.clients:
                runs = [asyncio.run(measure(url, bodies, clients)) for _ in range(options.rounds)]
                rows.append(max(runs, key=lambda r: r["tokens_per_s"]))
                print(json.dumps(rows[-1]), flush=True)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    model = f"GPT-2-small's shape, {options.layers} layers, {options.dtype}"
    result = {"machine": describe_machine(options.threads), "model": model, "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def wait(url: str, server: Any) -> None:
    """Wait until the server is ready."""
    while True:
        assert server.poll() is None, "the server has ended"
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)


if __name__ == "__main__":
    main()
