"""Fourteen architectures of transformers: exact as eager, and how few launches a layer takes.

In: names; each a default configuration of random weights, cut to two layers. Out: a table and
benchmarks/results/architectures.json: errors against float64 at several shapes (parity.py), the
launches that a third layer adds, regions that took several kernels and ops left to ATen, and why::

    python benchmarks/architectures.py bert llama --shapes 1,1 2,17
"""

from __future__ import annotations

import argparse
import gc
import json
from collections import Counter
from pathlib import Path

import torch
import transformers
from parity import compare, make_inputs, make_model, processor

import turbotx

RESULTS = Path(__file__).parent / "results" / "architectures.json"
ARCHITECTURES = (
    "bert", "distilbert", "roberta", "albert", "electra", "gpt2", "opt", "t5", "llama", "mistral",
    "qwen2", "vit", "bart", "modernbert",
)  # fmt: skip
SHAPES = ("1,1", "2,17", "7,2", "3,40")


def count_layer(architecture: str) -> dict[str, int]:
    """Return the launches of one layer by kind: what three layers have more than two.

    They do not depend on the sizes, so small ones are taken.
    """
    found = []
    for layers in (2, 3):
        model = make_model(architecture, layers, small=True)
        fast = turbotx.optimize(
            model, backend="aten"
        )  # the launches are the same, nothing is built
        fast(**make_inputs(model, 2, 8, torch.float32))
        (compiled,) = fast._engine.variants()
        found.append(Counter(launch.kind for launch in compiled.assembly.launches))
    return dict(found[1] - found[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="batch,length")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--vocab", type=int, help="tokens, where memory is short: only looked up")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    shapes = [(int(b), int(s)) for b, s in (shape.split(",") for shape in given.shapes)]
    known = json.loads(given.out.read_text())["models"] if given.out.exists() else []
    models = {(m["architecture"], m["dtype"]): m for m in known}
    for architecture in given.architectures:
        found = compare(architecture, given.dtype, shapes, 2, given.vocab)
        found |= {"layer": count_layer(architecture), "vocab": given.vocab}
        print(f"{architecture:12} a layer: {found['layer']}", flush=True)
        models[architecture, given.dtype] = found
        order = sorted(models.values(), key=lambda m: ARCHITECTURES.index(m["architecture"]))
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        record = {"device": processor(), "versions": versions, "models": order}
        given.out.parent.mkdir(exist_ok=True)
        given.out.write_text(json.dumps(record, indent=1) + "\n")
        gc.collect()
    return int(any(not row["passes"] for m in models.values() for row in m["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
