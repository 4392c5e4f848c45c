"""A decode step: one more token behind a key/value cache, turbotx against eager, one thread.

In: shapes of a model, dtypes, batches and pasts; all by default, random weights. Out: a line a row
and benchmarks/results/decode.json, written after each row, with the time to stream the weights once
(at a bandwidth measured in the same run) beside them. Engines take turns; times are process CPU
milliseconds, the least of the rounds::

    python benchmarks/decode.py --models gpt2-small --dtypes float32 --batches 1 --pasts 64
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import turbotx
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


def prefill(model: Any, batch: int, past: int) -> Any:
    """Return a cache that holds `past` tokens."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    ids = torch.randint(0, 1000, (batch, past))
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def time_steps(model: Any, cache: Any, batch: int) -> list[float]:
    """Return the milliseconds of each step."""
    times = []
    for _ in range(STEPS):
        token = torch.randint(0, 1000, (batch, 1))
        begin = time.process_time()
        model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        times.append((time.process_time() - begin) * 1e3)
    return times


def stream_gb_per_s() -> float:
    """Return how fast one thread reads memory, by the best of a few sums."""
    data, best = torch.ones(STREAMED // 4), 0.0
    for _ in range(5):
        begin = time.process_time()
        data.sum()
        best = max(best, STREAMED / (time.process_time() - begin) / 1e9)
    return best


def measure(name: str, dtype: str, batch: int, past: int, rounds: int) -> dict[str, Any]:
    """Return one row: the least milliseconds of a step, by engine, and the floor of the weights."""
    torch.manual_seed(0)
    model = MODELS[name]().eval().to(DTYPES[dtype])
    engines = {"turbotx": turbotx.optimize(model), "eager": model}
    least = dict.fromkeys(engines, float("inf"))
    for _ in range(rounds):
        for engine, made in engines.items():
            cache = prefill(made, batch, past)
            least[engine] = min(least[engine], *time_steps(made, cache, batch)[2:])
    streamed = sum(p.nbytes for n, p in model.named_parameters() if "wpe" not in n)
    floor_ms = streamed / stream_gb_per_s() / 1e6
    return {"model": name, "dtype": dtype, "batch": batch, "past": past, "floor_ms": floor_ms,
            **{f"{engine}_ms": ms for engine, ms in least.items()},
            "captures": engines["turbotx"].stats()["captures"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--pasts", nargs="+", type=int, default=[64, 900])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows = record.setdefault("rows", [])
    names = ("model", "dtype", "batch", "past")
    with torch.no_grad():
        for key in (
            (m, d, b, p)
            for m in options.models for d in options.dtypes
            for b in options.batches for p in options.pasts
        ):  # fmt: skip
            row = measure(*key, options.rounds)
            rows[:] = [r for r in rows if tuple(r[n] for n in names) != key] + [row]
            record["machine"] = describe_machine(torch.get_num_threads())
            RESULTS.write_text(json.dumps(record, indent=1) + "\n")
            print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}"
                            for k, v in row.items()), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
