"""Inputs: shapes and inputs for the command line.

In: `--shape batch=4,seq=128` and a call's example inputs. Out: dims by name, and the inputs at
other sizes, with values repeated::

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
from turbotx.runtime.cache_memory import LEAST_CAPACITY

EXAMPLE_SHAPE = {"batch": 2, "seq": 16}


def parse_shape(text: str) -> dict[str, int]:
    """Return dims by name; raise InputError unless `text` is `name=size,...`."""
    dims: dict[str, int] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            raise InputError(f"--shape {text!r}: write names and sizes, as in batch=4,seq=128")
        if not (value.isascii() and value.isdigit() and len(value) < 19 and int(value) > 0):
            raise InputError(f"--shape {text!r}: {name} must be a whole number of at least 1")
        dims[name] = int(value)
    return dims


def huggingface_inputs(model: nn.Module, shape: Mapping[str, int]) -> dict[str, Any]:
    """Return random inputs for a Hugging Face module; half of the second row is padding.

    shape: batch and seq; with past, the call of a decoder with a cache of that many tokens, with
    padding in the first half of the second row. Raises InputError for a main input other than token
    ids or pixels.
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
    if "past" in shape:
        least = min(5, vocabulary - 1)
        past = torch.randint(least, vocabulary, (batch, shape["past"]), generator=generator)
        return {**inputs, **_with_cache(model, past, seq)}
    if "attention_mask" in accepted:
        mask = torch.ones_like(ids)
        mask[1:2, max(1, seq // 2) :] = 0
        inputs["attention_mask"] = mask
    if getattr(config, "use_cache", False) and "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def _with_cache(model: nn.Module, past: torch.Tensor, seq: int) -> dict[str, Any]:
    """Return the additional arguments of a call that follows the tokens `past`."""
    config: Any = getattr(model, "config", None)
    accepted = inspect.signature(model.forward).parameters
    if "past_key_values" not in accepted or getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"past is for a decoder alone, and this is {type(model).__name__}: leave it out, or "
            "use a factory that returns a call with a cache, FILE.py:make"
        )
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    mask = torch.ones(past.shape[0], past.shape[1] + seq, dtype=torch.long)
    mask[1:2, : past.shape[1] // 2] = 0
    call = {"past_key_values": cache, "use_cache": True}
    with torch.no_grad():
        model.eval()(input_ids=past, attention_mask=mask[:, : past.shape[1]], **call)
    return {"attention_mask": mask, **call}


def view_at(report: Report, dims: Mapping[str, int]) -> Report:
    """Return a report at dims of the command line, where `past` determines the length of a
    cache."""
    if "past" not in dims or "length" not in report.dims:
        return report.at(**dims)
    rest = {name: size for name, size in dims.items() if name != "past"}
    length = dims["past"] + rest.get("seq", report.dims["seq"])
    capacity = max(LEAST_CAPACITY, -(-length // LEAST_CAPACITY) * LEAST_CAPACITY)
    return report.at(**rest, length=length, capacity=capacity)


def resize(report: Report, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a call's inputs at the report's shape, with the example's values repeated or cut; for
    a call with a cache, in the form that its program takes."""
    args, kwargs = report.plain_call(args, kwargs)
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
