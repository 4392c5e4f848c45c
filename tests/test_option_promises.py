"""Options and ways of use, alone and together, of every architecture of docs/architectures.md."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch

from benchmarks.parity import ARCHITECTURES, make_inputs
from tests.models import small_model
from tests.option_promises import (
    SHAPES,
    WAYS,
    check_calls,
    multiplied,
    of_class,
    released,
    storages,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALWAYS = {("llama", "released"), ("gpt2", "int8 released saved"), ("bart", "released pickle")}
"""One with a sliced list of layers, one with turned weights, one that decides by values."""


def cases() -> list[Any]:
    return [
        pytest.param(
            name, way, dtype, id=f"{name}-{way}-{dtype}",
            marks=()
            if (name, way) in ALWAYS and dtype is torch.float32
            else pytest.mark.sweep,
        )
        for name in ARCHITECTURES
        for way in WAYS
        for dtype in DTYPES
    ]  # fmt: skip


@pytest.mark.parametrize("architecture, name, dtype", cases())
def test_it_keeps_what_it_promises(architecture: str, name: str, dtype: torch.dtype) -> None:
    model, way = small_model(architecture, dtype), WAYS[name]
    plain = copy.deepcopy(model)
    calls = [make_inputs(model, batch, seq, dtype) for batch, seq in SHAPES]
    names = multiplied(plain, calls[0])
    memory = storages(model, names)
    fast = way.optimized(model, calls[0])
    check_calls(way, fast, plain, calls)
    if not way.options.get("keep_weights", True) and way.make is not of_class:
        gc.collect()
        assert names and names <= released(model)
        assert not {n for n, left in memory.items() if left() is not None}
        if way.quantize == "none":
            state = model.state_dict()
            assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items())
    torch._dynamo.reset()
