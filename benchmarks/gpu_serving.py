"""The stages of `gpu.py` that serve: `turbotx serve --device cuda` in a process of its own.

In: `emit(name, numbers)` and a stage's arguments. Out: rows such as::

    serve/bert-base/fp16     {"holds": true, "worst_cosine": 0.99999, "clients32_texts_per_s": ...}
    serve/gpt2/fp16          {"holds": true, "rows": [{"clients": 8, "tokens_per_s": ...}, ...]}

Models have random weights and a tokenizer of bytes. What the server answers is compared with
PyTorch's own answers, and with what it answers when it is asked one thing at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import generation
import torch
from generation import httpx
from gpu_models import DTYPES
from gpu_plans import DRY
from gpu_timing import DEVICE
from serving_process import stop, wait_ready

Emit = Callable[[str, dict[str, Any]], None]
NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
TEXTS = 16 if DRY else 512
LAYERS = 2 if DRY else 12
LETTERS = "abcdefghijklmnopqrstuvwxyz "


@contextlib.contextmanager
def serving(folder: str, dtype: str, *options: str) -> Iterator[str]:
    """Run the command on a folder's model; yield the address of the server, which is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", "turbotx", "serve", folder, "--port", str(port), "--dtype",
               NAMES[dtype], "--device", DEVICE, "--log-level", "warning", *options]  # fmt: skip
    paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, cwd=root)
    try:
        wait_ready(f"http://127.0.0.1:{port}/ready", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


# --- texts to vectors ---


def serve_texts(emit: Emit, dtype: str) -> None:
    """BERT-base, texts of 5 to 500 tokens: one client, 32 clients, requests of 32 texts."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        generation.save_model(Path(folder), 1)  # for its tokenizer
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=generation.VOCABULARY, num_hidden_layers=LAYERS, pad_token_id=0
        )
        model = transformers.BertModel(config).eval()
        model.save_pretrained(folder)
        chooser = random.Random(0)
        texts = ["".join(chooser.choices(LETTERS, k=chooser.randint(5, 500))) for _ in range(TEXTS)]
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = [tokenizer(text)["input_ids"] for text in texts]
        begin = time.perf_counter()
        with serving(
            folder, dtype, "--pooling", "mean", "--cache-nbytes", "0", "--max-age-ms", "60000"
        ) as url:
            row: dict[str, Any] = {"ready_s": round(time.perf_counter() - begin, 1)}
            with httpx.Client(timeout=600) as client:
                info = client.get(f"{url}/info").json()
            row |= {"device": info.get("model_device", info.get("device")), "texts": TEXTS}
            vectors: list[Any] = []
            for clients, each in ((32, 1), (1, 1), (32, 1), (4, 32)):
                asked = texts[:64] if clients == 1 else texts
                took, vectors = asyncio.run(_embed(url, asked, clients, each))
                row[f"clients{clients}x{each}_texts_per_s"] = round(len(asked) / took, 1)
        row["worst_cosine"] = _worst_cosine(model, ids, vectors)
        emit(f"serve/bert-base/{dtype}", {"holds": row["worst_cosine"] > 0.9999, **row})


async def _embed(url: str, texts: list[str], clients: int, each: int) -> tuple[float, list[Any]]:
    """Ask for all texts, `each` a request, so many requests at a time; return s and vectors."""
    waiting = list(range(0, len(texts), each))
    found: dict[int, Any] = {}
    async with httpx.AsyncClient(timeout=600) as client:

        async def one() -> None:
            while waiting:
                first = waiting.pop(0)
                body = {"inputs": texts[first : first + each]}
                answer = await client.post(f"{url}/embed", json=body)
                assert answer.status_code == 200, answer.text
                found[first] = answer.json()

        begin = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        took = time.perf_counter() - begin
    return took, [vector for first in sorted(found) for vector in found[first]]


@torch.no_grad()
def _worst_cosine(model: Any, ids: list[list[int]], vectors: list[Any]) -> float:
    """Return the least cosine between what was answered and PyTorch's in float32."""
    model, worst = model.to(DEVICE if not DRY else "cpu").float(), 1.0
    for one, vector in list(zip(ids, vectors, strict=True))[:64]:
        given = torch.tensor([one], device=model.device)
        exact = model(input_ids=given).last_hidden_state[0].mean(0).cpu().double()
        mine = torch.tensor(vector, dtype=torch.float64)
        worst = min(worst, float(torch.nn.functional.cosine_similarity(exact, mine, 0)))
    return worst


# --- prompts to tokens ---


def serve_tokens(emit: Emit, dtype: str) -> None:
    """GPT-2-small: prompts of 8 to 300 tokens, 1, 8 and 16 clients; a prompt asked again."""
    with tempfile.TemporaryDirectory() as folder:
        generation.save_model(Path(folder), LAYERS)
        bodies = generation.requests(4 if DRY else 64)
        plain = [{**b, "stream": False, "stream_options": None} for b in bodies[:16]]
        begin = time.perf_counter()
        with serving(folder, dtype, "--task", "generate") as url:
            row: dict[str, Any] = {"ready_s": round(time.perf_counter() - begin, 1)}
            alone = asyncio.run(_complete(url, plain, 1))
            together = asyncio.run(_complete(url, plain, 16))
            row["equal_alone_and_together"] = sum(a == b for a, (b, _) in zip(
                (text for text, _ in alone), together, strict=True
            ))  # fmt: skip
            row["cached_tokens"] = sum(cached for _, cached in together)
            row["rows"] = [asyncio.run(generation.measure(url, bodies, n)) for n in (1, 8, 16)]
        row["like_eager"] = _like_eager(folder, dtype, plain, [text for text, _ in alone])
        row["asked"] = len(plain)
        emit(f"serve/gpt2/{dtype}", {"holds": row["cached_tokens"] > 0, **row})


async def _complete(
    url: str, bodies: list[dict[str, Any]], clients: int
) -> list[tuple[str, int]]:  # fmt: skip
    """Return each answer's text and how many tokens of its prompt were there already."""
    limit = asyncio.Semaphore(clients)
    async with httpx.AsyncClient(timeout=600) as client:

        async def one(body: dict[str, Any]) -> tuple[str, int]:
            async with limit:
                answer = await client.post(f"{url}/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            made = answer.json()
            details = made["usage"].get("prompt_tokens_details") or {}
            return made["choices"][0]["text"], details.get("cached_tokens", 0)

        return list(await asyncio.gather(*(one(b) for b in bodies)))


@torch.no_grad()
def _like_eager(folder: str, dtype: str, bodies: list[dict[str, Any]], texts: list[str]) -> int:
    """Return how many answers are the text that PyTorch's own greedy loop makes."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).to(DTYPES[dtype]).eval()
    model = model if DRY else model.to(DEVICE)
    alike = 0
    for body, text in zip(bodies, texts, strict=True):
        ids = torch.tensor([body["prompt"]], device=model.device)
        most = body["max_tokens"]
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, min_new_tokens=most,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        alike += tokenizer.decode(made[0, ids.shape[1] :]) == text
    return alike
