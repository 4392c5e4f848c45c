"""Options and ways of use together, of every architecture of docs/architectures.md.

In: architectures, dtypes, routes and options. Out: that each keeps what it promises. The sweep has
every pair of two of them, in rows of one of each.
"""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch

from benchmarks.parity import ARCHITECTURES, make_inputs
from tests.models import small_model
from tests.option_promises import (
    OPTIONS,
    REFUSED,
    ROUTES,
    SHAPES,
    check_calls,
    multiplied,
    of_class,
    released,
    storages,
    way_of,
)
from tests.pairwise import cover_pairs

DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
FACTORS = {
    "architecture": ARCHITECTURES,
    "route": tuple(ROUTES),
    "dtype": tuple(DTYPES),
    **{name: tuple(levels) for name, levels in OPTIONS.items()},
}
FIRST = {name: levels[0] for name, levels in FACTORS.items()}
ALWAYS = [
    {"architecture": "llama", "weights": "released"},
    {"architecture": "gpt2", "weights": "released", "numbers": "int8", "route": "saved"},
    {"architecture": "bart", "weights": "released", "route": "pickle"},
]
"""One with a sliced list of layers, one with turned weights, one that decides by values."""


def cases() -> list[Any]:
    def case(row: dict[str, str], *marks: Any) -> Any:
        told = [row["architecture"], row["dtype"], *(v for k, v in row.items() if FIRST[k] != v)]
        return pytest.param(row, id="-".join(dict.fromkeys(told)), marks=marks)

    always = [FIRST | row for row in ALWAYS]
    swept = [row for row in cover_pairs(FACTORS, REFUSED) if row not in always]
    return [*map(case, always), *(case(row, pytest.mark.sweep) for row in swept)]


@pytest.mark.parametrize("row", cases())
def test_it_keeps_what_it_promises(row: dict[str, str]) -> None:
    dtype, way = DTYPES[row["dtype"]], way_of(row)
    model = small_model(row["architecture"], dtype)
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
