"""A decode step: one more token behind a key/value cache, every engine alone, one thread.

In: shapes of a model, dtypes, batches, pasts and engines; all by default, random weights. Out: a
line a row and benchmarks/results/decode.json, written after each row, with the time to stream the
weights once (at a bandwidth measured in the same run) beside them; engines in int8 stream less.
Times are process CPU milliseconds, the least of the rounds: of a step, and of the prompt (`first`),
which gives the first token::

    python benchmarks/decode.py --models gpt2-small --dtypes float32 --batches 1 --pasts 64
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from decode_engines import ENGINES

from turbotx.cli.bench.runner import describe_machine

RESULTS = Path(__file__).parent / "results" / "decode.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STEPS = 24  # of one measurement: the cache grows by as many tokens
STREAMED = 256 << 20


def make_gpt2_small() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_positions=2048))


def make_llama_1b_of_four_layers() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32}
    more = {"num_key_value_heads": 8, "num_hidden_layers": 4, "vocab_size": 32000}
    return LlamaForCausalLM(LlamaConfig(**sizes, **more))


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "gpt2-small": make_gpt2_small,
    "llama-1b-4-layers": make_llama_1b_of_four_layers,
}


def stream_gb_per_s() -> float:
    """Return how fast one thread reads memory, by the best of a few sums."""
    data, best = torch.ones(STREAMED // 4), 0.0
    for _ in range(5):
        begin = time.process_time()
        data.sum()
        best = max(best, STREAMED / (time.process_time() - begin) / 1e9)
    return best


def measure_here(
    engine: str, name: str, dtype: str, batch: int, past: int, rounds: int
) -> tuple[float, float]:  # fmt: skip
    """Return the least milliseconds of a step, and of the prompt, by one engine in this process."""
    torch.manual_seed(0)
    model = MODELS[name]().eval().to(DTYPES[dtype])
    ids = torch.randint(0, 1000, (batch, past))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        run = ENGINES[engine](model, Path(folder))
        found = [run(ids, STEPS) for _ in range(rounds)]
        return min(min(steps[2:]) for _, steps in found), min(first for first, _ in found)


def measure(engines: list[str], key: tuple[str, str, int, int], rounds: int) -> dict[str, Any]:
    """Return one row: the least milliseconds of a step by each engine, each in a process of its
    own, or why there is none; and what streaming the weights once takes."""
    name, dtype, batch, past = key
    row: dict[str, Any] = {"model": name, "dtype": dtype, "batch": batch, "past": past}
    with torch.device("meta"):
        model = MODELS[name]().to(DTYPES[dtype])
    streamed = sum(p.nbytes for n, p in model.named_parameters() if "wpe" not in n)
    row["floor_ms"] = streamed / stream_gb_per_s() / 1e6
    for engine in engines:
        with ProcessPoolExecutor(1, get_context("spawn"), initializer=torch.set_num_threads,
                                 initargs=(1,)) as pool:  # fmt: skip
            try:
                step, first = pool.submit(measure_here, engine, *key, rounds).result()
                row |= {f"{engine}_ms": step, f"{engine}_first_ms": first}
            except Exception as error:  # shown in the engine's place
                row[f"{engine}_failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--pasts", nargs="+", type=int, default=[64, 900])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows = record.setdefault("rows", [])
    names = ("model", "dtype", "batch", "past")
    for key in itertools.product(options.models, options.dtypes, options.batches, options.pasts):
        before = next((r for r in rows if tuple(r[n] for n in names) == key), {})
        row = before | measure(options.engines, key, options.rounds)
        rows[:] = [r for r in rows if tuple(r[n] for n in names) != key] + [row]
        record["machine"] = describe_machine(torch.get_num_threads())
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
        print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}"
                        for k, v in row.items()), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
