"""Tables of variants against the families that they were made of, at any sizes.

In: tiny models compiled for GPUs that are not here. Out: the same kernels on the same grids, with
none missing; a family that decides by more than it says is refused.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

import turbotx
from tests.models import token_inputs
from tests.runtime.cuda.test_triton_programs import tiny
from turbotx.engine.compiled import Compiled
from turbotx.engine.optimize import engine_of
from turbotx.errors import SavedFileError, SaveError
from turbotx.ir.expr import compile_evaluator
from turbotx.kernels.schedule import INT32_LIMIT
from turbotx.runtime.cuda.runtime import LaunchKernels
from turbotx.runtime.cuda.variants import KernelFamily
from turbotx.saved.families import SavedFamily
from turbotx.saved.variants import Tabulator, Variants, check_table

pytest.importorskip("transformers")


def compile_for(target: str, model: torch.nn.Module, **options: Any) -> Compiled:
    fast = turbotx.optimize(model, **options)
    fast(**token_inputs(2, 3))
    (compiled,) = engine_of(fast).variants()
    return engine_of(fast).compile(compiled.captured, target)


def tables(compiled: Compiled) -> Iterator[tuple[LaunchKernels, Any, SavedFamily]]:
    """Give every family of a call's programs with its table."""
    for specialization in compiled.unbound.specializations:
        kernels, variants = specialization.code, Variants()
        assert isinstance(kernels, LaunchKernels)
        tabulator = Tabulator(kernels, variants)
        for family in kernels.in_order:
            table = tabulator.tabulate(family)
            yield kernels, family, replace(table, variants=variants.jobs)


def any_sizes(kernels: LaunchKernels, dims: Sequence[str], most: int) -> Iterator[Sequence[int]]:
    """Give sizes of calls of up to `most` tokens, few and many alike."""
    draw = random.Random(0)
    evaluate = compile_evaluator(list(kernels.table.values), dims)
    served = kernels.executable.token_range
    for _ in range(150):
        seq = int(2 ** draw.uniform(0, 14)) // draw.choice([1, 1, 16]) * draw.choice([1, 16])
        batch = int(2 ** draw.uniform(0, 14)) if seq < 64 else draw.randint(0, 40)
        shape = shape_of(dims, batch, seq)
        if batch * seq <= most and (served is None or served.holds(shape)):
            yield evaluate(*shape)


def shape_of(dims: Sequence[str], batch: int, seq: int) -> tuple[int, ...]:
    return tuple(batch if k == 0 or "_d0" in n else seq for k, n in enumerate(dims))


@pytest.mark.parametrize(
    ("name", "target", "options"),
    [("bert", "sm_90", {"attention": "fused-softmax"}), ("llama", "sm_100", {}),
     ("gpt2", "sm_80", {"attention": "fused-softmax", "pdl": True})],
)  # fmt: skip
def test_no_shape_asks_for_more_than_the_table_has(
    name: str, target: str, options: dict[str, Any]
) -> None:
    compiled = compile_for(target, tiny(name, torch.float16), **options)
    for kernels, family, table in tables(compiled):
        sizes = any_sizes(kernels, compiled.captured.dims, 1 << 24)
        check_table(family, table, kernels.adapt, sizes)


def test_what_counts_in_64_bits_has_rows_too() -> None:
    compiled = compile_for("sm_90", tiny("bert", torch.float16))
    wide, dims = 0, compiled.captured.dims
    for kernels, family, table in tables(compiled):
        evaluate = compile_evaluator(list(kernels.table.values), dims)
        for batch, seq in ((1 << 20, 3000), (1 << 16, 1 << 16), (INT32_LIMIT // 16, 1)):
            if isinstance(family, KernelFamily):
                sizes = evaluate(*shape_of(dims, batch, seq))
                check_table(family, table, kernels.adapt, iter([sizes]))
                wide += "i64" in {kind for _, kind in table.pick(sizes)[0].job.signature}
    assert wide


class Moody:
    """A family whose grid depends on a size that it does not speak of."""

    def __init__(self, family: KernelFamily) -> None:
        self._family, self.deciders = family, family.deciders

    def pick(self, sizes: Sequence[int]) -> list[Any]:
        (part,) = self._family.pick(sizes)
        count = part.grid[0] if part.grid[0] < 100 else 1
        return [replace(part, grid=(count, 1, 1))]


def test_a_family_that_decides_by_more_than_it_says_is_refused() -> None:
    compiled = compile_for("sm_90", tiny("bert", torch.float16))
    kernels = compiled.specialization.code
    assert isinstance(kernels, LaunchKernels)
    family: Any = Moody(next(f for f in kernels.in_order if isinstance(f, KernelFamily)))
    variants = Variants()
    table = Tabulator(kernels, variants).tabulate(family)
    table = replace(table, variants=variants.jobs)
    sizes = any_sizes(kernels, compiled.captured.dims, 1 << 24)
    with pytest.raises(SaveError, match="by more than a file can say"):
        check_table(family, table, kernels.adapt, sizes)


def test_a_row_that_is_missing_names_the_kernel() -> None:
    compiled = compile_for("sm_90", tiny("bert", torch.float16))
    kernels, _, table = next(tables(compiled))
    dims = compiled.captured.dims
    evaluate = compile_evaluator(list(kernels.table.values), dims)
    with pytest.raises(SavedFileError, match=r"no variant .* of fused_"):
        replace(table, rows={}).pick(evaluate(*shape_of(dims, 64, 64)))
