"""Verify a saved file: compares its outputs with the original model's, in float64.

In: a module of `turbotx.load`, the model, one call's inputs. Out: the error of every output::

    verify_saved(load("model.ttx"), engine_of(model), (), {"input_ids": ids})
      ->  {"batch": 2, "seq": 16}, Numerics(launches=(), outputs=(Error("output 0", ...), ...))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree

from turbotx.engine.cached_engine import plain_call
from turbotx.engine.engine import Engine
from turbotx.errors import InputError
from turbotx.ir.quantized_ops import Scheme
from turbotx.report.numerics import Numerics, measure_outputs
from turbotx.runtime.packed_parameter import PackedParameter
from turbotx.saved.load import SavedModule


def verify_saved(
    saved: SavedModule, engine: Engine, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, int], Numerics]:
    """Return the dims of a call and the errors of its outputs, or their similarity if the file is
    quantised.

    Raises InputError if the file has no such call, or holds other weights than the model.
    """
    _compare_weights(saved, engine.model)
    engine, args, kwargs = plain_call(engine, args, kwargs)
    table, args, plain = saved.plain_call(args, dict(kwargs))
    call, binding = table.find(args, plain)
    ours = pytree.tree_leaves(table.run(args, plain))
    found = measure_outputs(engine, call.program, args, kwargs, ours)
    return dict(zip(call.program.dims, binding.dims, strict=True)), found


def _compare_weights(saved: SavedModule, model: torch.nn.Module) -> None:
    own = model.state_dict()
    for name, tensor in saved.state_dict(keep_vars=True).items():
        if name not in own or not _is_same(own[name], tensor):
            seen = "the model does not have" if name not in own else "the model has other values of"
            raise InputError(
                f"the file holds {name}, which {seen}: verify it against the model that it was "
                "saved from, its --weights and --dtype included, or save it again"
            )


def _is_same(own: torch.Tensor, saved: torch.Tensor) -> bool:
    """Return whether a model's tensor is that of a file, or what it has as integers."""
    if not isinstance(saved, PackedParameter):
        return torch.equal(own, saved)
    weight, rows = saved.weight, own.t() if saved.transposed else own
    scale = weight.scale
    if own.shape != saved.shape or scale is None:
        return torch.equal(own, saved.unpacked())
    some = slice(saved.first, saved.first + rows.shape[0])
    narrow = Scheme(True, weight.group, weight.shifted).integers_of(rows, scale[some])
    return torch.equal(narrow, weight.rows(saved.first, rows.shape[0]))
