"""What a call costs beyond its kernels: its guards, each launch, and the rest of its Python.

In: models; by default MiniLM, BERT-base, and steps of GPT-2-small behind 64 and 900 tokens. Out: a
line a model and benchmarks/results/dispatch.json. `guards_us` is a call's checks, parameters
included; `between_launches_us` what a launch costs around its own work; `call_us` all that a call
takes, `native_us` the native run within it, and `outside_us` the Python around that, guards left
out::

    python benchmarks/dispatch.py --models minilm --shape 1x10
    python benchmarks/dispatch.py --models gpt2-small --pasts 64 900
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import turbotx
from turbotx.cli.bench.runner import describe_machine
from turbotx.cli.inputs import huggingface_inputs
from turbotx.cli.models import Source
from turbotx.runtime.cpu.executor import CpuExecutor

RESULTS = Path(__file__).parent / "results" / "dispatch.json"
DECODERS = {"gpt2-small": "hf-config:gpt2"}
MODELS = {"minilm": "minilm", "bert-base": "hf-config:bert", **DECODERS}


def begin_steps(fast: Any, batch: int, past: int) -> dict[str, Any]:
    """Return what a step of one token takes behind `past` tokens; its cache grows by one each."""
    from transformers import DynamicCache

    cache, ids = DynamicCache(config=fast.config), torch.randint(0, 1000, (batch, past))
    with torch.no_grad():
        fast(input_ids=ids, past_key_values=cache, use_cache=True)
    return {"input_ids": ids[:, :1].contiguous(), "past_key_values": cache, "use_cache": True}


@contextmanager
def native_times() -> Iterator[list[float]]:
    """Yield a list that gets the microseconds of every native run within the context."""
    run, native = CpuExecutor.run, list[float]()

    def run_timed(*args: Any, **options: Any) -> int:
        begin = time.perf_counter()
        failed = run(*args, **options)
        native.append((time.perf_counter() - begin) * 1e6)
        return failed

    with mock.patch.object(CpuExecutor, "run", run_timed):
        yield native


def measure(name: str, batch: int, seq: int, past: int, runs: int) -> dict[str, Any]:
    """Return microseconds of one model at one shape, medians over `runs` calls; with a past, of
    steps of one token, which lengthen it."""
    model = Source(MODELS[name]).load({}).model
    fast, shape = turbotx.optimize(model), {"batch": batch, "seq": seq}
    given = begin_steps(fast, batch, past) if past else huggingface_inputs(model, shape)
    whole: list[float] = []
    with torch.no_grad(), native_times() as native:
        for _ in range(runs + 3):
            begin = time.perf_counter()
            fast(**given)
            whole.append((time.perf_counter() - begin) * 1e6)
    found = turbotx.explain(fast, **given).profile(**given, runs=runs)
    around = [all_of_it - inside for all_of_it, inside in zip(whole, native, strict=True)]
    call_us, native_us, around_us = (statistics.median(us[3:]) for us in (whole, native, around))
    return {
        "model": name, "batch": batch, "seq": seq, "past": past, "launches": len(found.launches),
        "parameters": sum(1 for _ in model.parameters()),
        "guards_us": round(found.guards_us, 2),
        "between_launches_us": round(found.between_launches_us, 3),
        "native_us": round(native_us, 1), "call_us": round(call_us, 1),
        "outside_us": round(around_us - found.guards_us, 1), "runs": runs,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--shape", default="1x10", metavar="BATCHxSEQ")
    parser.add_argument("--pasts", type=int, nargs="+", default=[64, 900], help="of decoders")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    keys = ("model", "batch", "seq", "past")
    rows = {tuple(r.get(k, 0) for k in keys): r for r in record.get("rows", [])}
    batch, seq = map(int, options.shape.split("x"))
    shapes = [(n, 1, p) for n in options.models if n in DECODERS for p in options.pasts]
    shapes = [(n, seq, 0) for n in options.models if n not in DECODERS] + shapes
    for name, count, past in shapes:
        row = rows[name, batch, count, past] = measure(name, batch, count, past, options.runs)
        record = {"machine": describe_machine(options.threads), "rows": list(rows.values())}
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
