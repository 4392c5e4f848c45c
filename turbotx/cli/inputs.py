"""Shapes and inputs on the command line.

In: `--shape batch=4,seq=128` and a call's example inputs. Out: dims by name, and the same inputs at
other sizes, their values repeated::

    parse_shape("batch=4,seq=128")  ->  {"batch": 4, "seq": 128}
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from turbotx.errors import InputError
from turbotx.ir.expr import evaluate
from turbotx.passes.pack import PackedCapture
from turbotx.report import Report

EXAMPLE_SHAPE = {"batch": 2, "seq": 16}


def parse_shape(text: str) -> dict[str, int]:
    """Return dims by name; raise InputError for what is not `name=size,...`."""
    dims: dict[str, int] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            raise InputError(f"--shape {text!r}: write names and sizes, as in batch=4,seq=128")
        if not value.isdigit() or int(value) < 1:
            raise InputError(f"--shape {text!r}: {name} must be a whole number of at least 1")
        dims[name] = int(value)
    return dims


def huggingface_inputs(model: nn.Module, shape: Mapping[str, int]) -> dict[str, Any]:
    """Return random inputs of a Hugging Face module; the second row is padded to half.

    Raises InputError for a main input other than token ids or pixels.
    """
    main = str(getattr(model, "main_input_name", "input_ids"))
    config: Any = getattr(model, "config", None)
    batch, seq = shape.get("batch", 2), shape.get("seq", 16)
    generator = torch.Generator().manual_seed(0)
    accepted = inspect.signature(model.forward).parameters
    if main == "pixel_values":
        side, channels = getattr(config, "image_size", 224), getattr(config, "num_channels", 3)
        sides = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
        return {main: torch.randn(batch, channels, *sides, generator=generator)}
    if main != "input_ids":
        raise InputError(f"no example is known for the input {main!r}: use a factory, FILE.py:make")
    vocabulary = int(getattr(config, "vocab_size", 1000))
    ids = torch.randint(min(5, vocabulary - 1), vocabulary, (batch, seq), generator=generator)
    inputs: dict[str, Any] = {"input_ids": ids}
    if "attention_mask" in accepted:
        mask = torch.ones_like(ids)
        mask[1:2, max(1, seq // 2) :] = 0
        inputs["attention_mask"] = mask
    if getattr(config, "use_cache", False) and "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def resize(report: Report, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a call's inputs at the report's shape, the example's values repeated or cut."""
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    captured = report.compiled.captured
    called = captured.padded if isinstance(captured, PackedCapture) else captured
    sizes = iter(called.input_sizes)
    resized = [
        _tile(leaf, [evaluate(e, report.dims) for e in next(sizes)])
        if isinstance(leaf, torch.Tensor)
        else leaf
        for leaf in leaves
    ]
    return pytree.tree_unflatten(resized, spec)


def _tile(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    for d, size in enumerate(shape):
        if tensor.shape[d] != size:
            if tensor.shape[d] == 0:
                raise InputError("an example input is empty: give one with elements")
            tensor = tensor.index_select(d, torch.arange(size) % tensor.shape[d])
    return tensor
