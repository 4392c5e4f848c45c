"""Latency of whole models on a CPU: every engine in a process of its own, rounds interleaved.

In: which models, dtypes, shapes and engines; all of them by default. Out: a line a row and
benchmarks/results/latency.json, written after each row: what was measured before stays, so the
grid can be run in slices. `floor-…` is the GEMMs and attention alone, cli/bench/gemms_only.py::

    python benchmarks/latency.py --models minilm --dtypes float32 --engines turbotx eager
    python benchmarks/latency.py --models bert-large llama-1b --dtypes bfloat16 --shapes 1x10 1x128
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from turbotx.cli.bench.engines import ENGINES
from turbotx.cli.bench.runner import CallPattern, OthersUse, Runner, describe_machine
from turbotx.cli.inputs import huggingface_inputs
from turbotx.cli.models import Source

RESULTS = Path(__file__).parent / "results" / "latency.json"
SHAPES = ("1x10", "1x40", "1x128", "4x64", "8x128")
MODELS = {"minilm": "minilm", "bert-base": "hf-config:bert"}
DTYPES = ("float32", "bfloat16")
LARGE = {
    "bert-large": "hf-config:bert,hidden_size=1024,intermediate_size=4096,num_hidden_layers=24,"
    "num_attention_heads=16",
    "llama-1b": "hf-config:llama,hidden_size=2048,intermediate_size=5632,num_hidden_layers=22,"
    "num_attention_heads=32,num_key_value_heads=4,use_cache=False",
}
"""Measured where they are named, with what else is given for all: gigabytes an engine."""


def write_inputs(source: Source, shapes: list[str], folder: Path) -> dict[str, Path]:
    """Write token ids and a mask of ones at every shape."""
    model = source.load({}).model
    files = {}
    for shape in shapes:
        batch, seq = map(int, shape.split("x"))
        inputs = huggingface_inputs(model, {"batch": batch, "seq": seq})
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        files[shape] = folder / f"{shape}.pt"
        torch.save(((), inputs), files[shape])
    return files


def merge(record: dict[str, Any], key: dict[str, str], found: dict[str, Any]) -> None:
    """Add engines to the row of this model, dtype and shape."""
    rows = record.setdefault("rows", [])
    row = next((r for r in rows if all(r[k] == v for k, v in key.items())), None)
    if row is None:
        row = {**key, "engines": {}, "failed": {}}
        rows.append(row)
    for engine, entry in found.items():
        kept, other = ("failed", "engines") if isinstance(entry, str) else ("engines", "failed")
        row[kept][engine] = entry
        row[other].pop(engine, None)


def measure(name: str, dtype: str, options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Measure one model at every shape; save after each."""
    source = Source((MODELS | LARGE)[name], dtype)
    with tempfile.TemporaryDirectory() as folder:
        files = write_inputs(source, options.shapes, Path(folder))
        with Runner(options.engines, source, options.threads) as runner:
            for shape, file in files.items():
                began = time.time()
                with OthersUse(runner) as others:
                    spreads = runner.measure(file, CallPattern(rounds=options.rounds))
                together = sorted(spreads)
                found: dict[str, Any] = {
                    e: {**asdict(s), "beside": together, "others_cores": others.cores}
                    for e, s in spreads.items()
                }
                merge(
                    record, {"model": name, "dtype": dtype, "shape": shape}, found | runner.failed
                )
                save(record, options)
                shown = "  ".join(f"{e} {s.median_ms:.2f}" for e, s in spreads.items())
                took = f"{time.time() - began:.0f} s, others {others.cores} cores"
                print(f"{name} {dtype} {shape}:  {shown}  ({took})", flush=True)
            for engine, why in runner.failed.items():
                print(f"{name} {dtype} without {engine}: {why}", flush=True)


def save(record: dict[str, Any], options: argparse.Namespace) -> None:
    record["machine"] = describe_machine(options.threads)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS | LARGE)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="BATCHxSEQ")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.models:
        for dtype in options.dtypes:
            measure(name, dtype, options, record)


if __name__ == "__main__":
    main()
