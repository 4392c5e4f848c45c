"""Small sizes: architectures of transformers at batch and length 2, 1 and 0, against eager.

In: names; each a small model of two layers and random weights. Out: a line a model and order of
calls: captures, and every shape where the result differs, or turbotx refuses what eager runs::

    python benchmarks/small_sizes.py bert gpt2 --backend aten
    bert         first 2x3   7 shapes, 3 captures, 0 differ, 0 refused
"""

from __future__ import annotations

import argparse
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from architectures import ARCHITECTURES
from parity import make_inputs, make_model
from torch import nn

import turbotx
from turbotx.errors import TurbotxError

OTHERS = (
    "phi", "phi3", "stablelm", "granite", "cohere", "qwen3", "gemma", "gemma3_text", "olmo",
    "olmo2", "starcoder2", "gpt_neox", "gpt_bigcode", "falcon", "xlnet", "roformer", "nomic_bert",
    "eurobert",
    "data2vec-text", "layoutlm", "megatron-bert", "rembert", "convbert", "camembert", "ernie",
    "splinter", "deberta", "mobilebert", "squeezebert", "fnet", "beit", "deit", "dinov2",
    "siglip_vision_model", "clip_vision_model", "swin",
    "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "bert-generation", "biogpt", "xglm",
    "openai-gpt", "helium", "smollm3", "glm", "glm4", "olmo3", "arcee", "ernie4_5", "seed_oss",
    "exaone4", "apertus", "vaultgemma", "ibert", "persimmon",
)  # fmt: skip
ORDERS = (
    ((2, 3), (1, 3), (2, 1), (1, 1), (0, 3), (2, 0), (0, 0)),
    ((1, 1), (2, 3), (0, 1), (1, 0), (2, 1), (1, 3)),
)


def attempt(model: Any, inputs: dict[str, Any]) -> Any:
    """Return the tensors of a model's output, or what it raised."""
    try:
        with torch.no_grad():
            output = model(**inputs)
    except Exception as error:
        return error
    return [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]


def find_fault(ours: Any, eager: Any) -> str:
    """Return how a result differs from eager's, "" where it does not, or where eager raises too."""
    if isinstance(ours, Exception):
        # Where PyTorch runs an op, its own error comes from both.
        same = isinstance(ours, TurbotxError) or type(ours) is type(eager)
        kind = "" if same else "crash "
        lines = str(ours).splitlines() or [""]
        text = f"{kind}{type(ours).__name__}: {' '.join(lines[:2])[:300]}"
        return "" if isinstance(eager, Exception) and not kind else text
    if isinstance(eager, Exception):
        return f"runs where eager raises {type(eager).__name__}: {str(eager)[:80]}"
    if [(t.shape, t.dtype) for t in ours] != [(t.shape, t.dtype) for t in eager]:
        shapes = [[tuple(t.shape) for t in tensors] for tensors in (ours, eager)]
        return f"differs: {shapes[0]} instead of {shapes[1]}"
    close = (
        torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)
        for a, b in zip(ours, eager, strict=True)
    )
    return "" if all(close) else "differs in values"


def check(
    model: nn.Module, shapes: Sequence[tuple[int, int]], backend: str
) -> tuple[int, list[str]]:
    """Return the captures and the faults of calls at these shapes, in their order."""
    fast, faults = turbotx.optimize(model, backend=backend), []
    for batch, seq in shapes:
        inputs = make_inputs(model, batch, seq, torch.float32)
        eager, ours = attempt(model, inputs), attempt(fast, inputs)
        fault = find_fault(ours, eager)
        if fault:
            faults.append(f"{batch}x{seq}: {fault}")
            if fault.startswith("crash"):
                traceback.print_exception(ours)
    return fast.stats()["captures"], faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", default=(*ARCHITECTURES, *OTHERS))
    parser.add_argument("--backend", default="auto", choices=("auto", "aten"))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    total = 0
    for name in given.architectures:
        try:
            model = make_model(name, 2, small=True)
        except Exception as error:  # a configuration that does not become small so
            print(f"{name:12} was not made: {type(error).__name__}: {str(error)[:120]}", flush=True)
            continue
        for shapes in ORDERS:
            captures, faults = check(model, shapes, given.backend)
            first = "x".join(map(str, shapes[0]))
            found = f"{len(shapes)} shapes, {captures} captures, {len(faults)} faults"
            print(f"{name:12} first {first:5} {found}", *faults, sep="\n    ", flush=True)
            total += len(faults)
    return int(total > 0)


if __name__ == "__main__":
    raise SystemExit(main())
