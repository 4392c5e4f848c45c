"""Batches of mixed lengths: over their tokens, padded, and a text at a time.

In: models, distributions of lengths, batch sizes, engines. Out: a line a row and
benchmarks/results/packed.json, written after each row: milliseconds a batch, and microseconds a
real token beside those of one unpadded text of the mean length. `--dry-run` shows the rows, and
what padding adds to each, and runs nothing::

    python benchmarks/packed.py --models minilm --lengths uniform --batches 8 --dry-run
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch

from turbotx.cli.bench.engines import ENGINES
from turbotx.cli.bench.runner import CallPattern, OthersUse, Runner, describe_machine
from turbotx.cli.models import Source

RESULTS = Path(__file__).parent / "results" / "packed.json"
MODELS = {"minilm": "minilm", "bert-base": "hf-config:bert"}
LENGTHS = ("uniform", "lognormal")
BATCHES = (8, 32)
DEFAULT = (
    "turbotx-packed", "turbotx-packed-int8", "turbotx", "eager", "onnxruntime",
    "onnxruntime-optimized", "onnxruntime-int8", "openvino", "openvino-int8",
)  # fmt: skip
SEED = 7
LONGEST = 500


def take_lengths(distribution: str, batch: int) -> list[int]:
    """Return the quantiles of a distribution of 5 to 500 tokens, as many as there are texts: a
    batch that is neither luckier nor unluckier than most."""
    places = [(k + 0.5) / batch for k in range(batch)]
    if distribution == "uniform":
        drawn = [5 + (LONGEST - 5) * p for p in places]
    else:  # a median of 60 tokens, one in forty above 430
        drawn = [math.exp(NormalDist(math.log(60), 1.0).inv_cdf(p)) for p in places]
    lengths = [min(LONGEST, max(5, round(n))) for n in drawn]
    random.Random(SEED).shuffle(lengths)
    return lengths


def write_inputs(lengths: list[int], vocab: int, path: Path) -> None:
    """Write token ids and a mask of these lengths, padded to the longest on the right."""
    width = max(lengths)
    ids = torch.randint(5, vocab, (len(lengths), width), generator=torch.manual_seed(SEED))
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    torch.save(((), {"input_ids": ids * mask, "attention_mask": mask}), path)


def measure(
    runner: Runner, lengths: list[int], vocab: int, load: CallPattern, folder: str
) -> dict[str, Any]:
    """Return what every engine takes for the batch, and for one text of the mean length."""
    batch, one = Path(folder) / "batch.pt", Path(folder) / "one.pt"
    mean = round(sum(lengths) / len(lengths))
    write_inputs(lengths, vocab, batch)
    write_inputs([mean], vocab, one)
    with OthersUse(runner) as others:
        whole, single = runner.measure(batch, load), runner.measure(one, load)
    found: dict[str, Any] = {"others_cores": others.cores, "mean": mean, "engines": {}}
    for name, spread in whole.items():
        per_token = 1000 * spread.median_ms / sum(lengths)
        alone = 1000 * single[name].median_ms / mean if name in single else None
        found["engines"][name] = {
            **asdict(spread), "us_a_token": round(per_token, 3),
            "us_a_token_alone": None if alone is None else round(alone, 3),
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--lengths", nargs="+", default=list(LENGTHS), choices=LENGTHS)
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--engines", nargs="+", default=list(DEFAULT), choices=ENGINES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=3, help="calls that are not counted")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="show the rows, run nothing")
    options = parser.parse_args()
    rows = [(d, b, take_lengths(d, b)) for d in options.lengths for b in options.batches]
    load = CallPattern(rounds=options.rounds, warmup=options.warmup)
    if options.dry_run:
        for distribution, batch, lengths in rows:
            padded, tokens = batch * max(lengths), sum(lengths)
            print(f"{distribution} x {batch}: {tokens} tokens of {padded}, {padded / tokens:.2f} x")
        return
    record = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    for name in options.models:
        source = Source(MODELS[name])
        vocab = source.load({}).model.config.vocab_size
        with (
            tempfile.TemporaryDirectory() as folder,
            Runner(options.engines, source, options.threads) as runner,
        ):
            for distribution, batch, lengths in rows:
                key = {"model": name, "lengths": distribution, "batch": batch}
                found = measure(runner, lengths, vocab, load, folder)
                row = key | {"tokens": sum(lengths), "longest": max(lengths)} | found
                row["failed"] = dict(runner.failed)
                kept = [r for r in record["rows"] if any(r[k] != v for k, v in key.items())]
                record |= {"rows": [*kept, row], "machine": describe_machine(options.threads)}
                options.out.parent.mkdir(exist_ok=True)
                options.out.write_text(json.dumps(record, indent=1) + "\n")
                shown = (f"{e} {x['median_ms']:.1f}" for e, x in found["engines"].items())
                print(f"{name} {distribution} x {batch}: {', '.join(shown)} ms", flush=True)


if __name__ == "__main__":
    main()
