"""Input names: names a capture's inputs and dims.

In: a model, a call's arguments, their fake tensors. Out: a Python name per input, from the
parameter of forward that it belongs to, and a dim per size that varies, named as a user would::

    forward(input_ids, attention_mask)  ->  input_ids (batch, seq), attention_mask (batch, seq)
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import nn

from turbotx.capture.arguments import flatten_call, is_float
from turbotx.ir.expr import dim, expr


def name_inputs(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """Return a Python name per input, from the parameter of forward that it belongs to."""
    forward = getattr(model, "turbotx_signature_of", model.forward)
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    positional = [
        p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    named = [
        (positional[i] if i < len(positional) else f"arg{i}", arg) for i, arg in enumerate(args)
    ]
    found = []
    for label, value in (*named, *kwargs.items()):
        leaves, _ = flatten_call((value,), {})
        for k, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor) or is_float(leaf):
                found.append(str(label) if len(leaves) == 1 else f"{label}_{k}")
    return found


def find_hints(shape_env: Any, symbols: Mapping[sympy.Symbol, sympy.Symbol]) -> tuple[int, ...]:
    """Return each dim's size while tracing."""
    newer = hasattr(shape_env, "backed_var_to_val")  # renamed in torch 2.12
    values = getattr(shape_env, "backed_var_to_val" if newer else "var_to_val", {})
    return tuple({dim: int(values.get(symbol, 2)) for symbol, dim in symbols.items()}.values())


def name_dims(
    shapes: Sequence[Sequence[Any]], names: Sequence[str],
    equals: Mapping[sympy.Symbol, sympy.Symbol], said: Mapping[str, str],
) -> dict[sympy.Symbol, sympy.Symbol]:  # fmt: skip
    """Name dims: those of the first input batch and seq, others by input and index.

    equals: symbols that stand for the same size as another one, and get its name. said: names that
    replace those by input and index.
    """
    symbols: dict[sympy.Symbol, sympy.Symbol] = {}
    taken: set[str] = set()
    plain = {0: "batch", 1: "seq"}
    for shape, name in zip(shapes, names, strict=True):
        for d, size in enumerate(shape):
            for symbol in sorted(expr(size).free_symbols, key=str):
                if symbol in symbols:
                    continue
                known = [s for s in symbols if equals.get(s, s) == equals.get(symbol, symbol)]
                if known:
                    symbols[symbol] = symbols[known[0]]
                    continue
                label = plain.get(d, "") if len(shape) <= 3 or d == 0 else ""
                if not label or label in taken:
                    label = said.get(f"{name}_d{d}", f"{name}_d{d}")
                taken.add(label)
                symbols[symbol] = dim(label)
    return symbols
