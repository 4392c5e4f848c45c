"""TurboTransformers' layout of BERT's weights, as written by its converter to `.npz` files.

In: entries in which query, key and value are one matrix and dense weights are transposed. Out:
entries with the names and orientation of Hugging Face's BERT::

    encoder.layer.0.attention.qkv.weight (in, 3 x out)  ->  ...attention.self.query.weight (out, in)
                                              ...self.key.weight, ...self.value.weight
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

PACKED = {"qkv.weight": "weight", "qkv.bias": "bias"}
PARTS = ("query", "key", "value")
# The matrices, besides Q, K and V, that its layers multiply from the right.
TRANSPOSED = ("output.dense.weight", "intermediate.dense.weight", "pooler.dense.weight")


def is_packed(entries: Collection[str], expected: Collection[str]) -> bool:
    """Return whether a file has packed entries where the model has query, key and value."""
    return any(
        name not in expected and all(part in expected for part in _parts(name, suffix))
        for name in entries
        for suffix in PACKED
        if name.endswith(f".{suffix}")
    )


def _parts(name: str, suffix: str) -> list[str]:
    stem = name.removesuffix(suffix)
    return [f"{stem}self.{part}.{PACKED[suffix]}" for part in PARTS]


def unpack(entries: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the entries in Hugging Face's layout; those not divisible by three are unchanged."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in entries.items():
        suffix = next((s for s in PACKED if name.endswith(f".{s}")), None)
        if suffix is not None and tensor.dim() > 0 and tensor.shape[-1] % 3 == 0:
            pieces = tensor.chunk(3, dim=-1)
            oriented = [p.t() if p.dim() == 2 else p for p in pieces]
            found.update(zip(_parts(name, suffix), oriented, strict=True))
        elif name.endswith(TRANSPOSED) and tensor.dim() == 2:
            found[name] = tensor.t()
        else:
            found[name] = tensor
    return found
