"""Describe a program for a GPU: the tables of a saved file, kernels as tables of variants.

In: a program compiled for a target, which need not be here. Out: what `saved.gpu_program` runs
from, beside what `saved.describe` says of every program::

    {"target": "sm_90", "share": [["batch * seq"], [[0, 64]]], "families": [...], "launches": [...]}
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from turbotx import ir
from turbotx.engine.compiled import Compiled
from turbotx.ir.expr import compile_evaluator, to_python
from turbotx.kernels.gemm_heuristics import BUCKETS
from turbotx.runtime.cuda.dispatch import TokenRange
from turbotx.runtime.cuda.gemm import find_library_call, library_operands, runs_relu
from turbotx.runtime.cuda.runtime import CudaRuntime
from turbotx.runtime.program import Program
from turbotx.saved.describe import describe_call, describe_step, describe_window
from turbotx.saved.values import encode_constant
from turbotx.saved.variants import Tabulator, Variants, check_table

# Sizes of every dim at which a file is compared with the program that it was made of.
TRIED = (1, 3, 16, 40, 96, 500, 1024, 5000)


def describe_for_gpu(compiled: Compiled, variants: Variants, most_graphs: int) -> dict[str, Any]:
    """Return a compiled call as JSON; its kernels are added to `variants`."""
    program, runtime = compiled.program, compiled.program.runtime
    assert isinstance(runtime, CudaRuntime)
    families = list({id(f): f for f in runtime.families.values()}.values())
    number = {id(f): k for k, f in enumerate(families)}
    tabulator = Tabulator(runtime, program.dims, variants)
    tables = [tabulator.tabulate(f) for f in families]
    for family, table in zip(families, tables, strict=True):
        whole = replace(table, variants=variants.jobs)
        check_table(family, whole, runtime.kernels.adapt, _tried(runtime, program.dims))
    inputs = [t for t in program.assembly.tensors.values() if t.kind == "input"]
    return {
        **describe_call(compiled),
        "target": runtime.device.target,
        "share": None if runtime.tokens is None else _describe_range(runtime.tokens),
        "families": [table.to_json() for table in tables],
        "launches": [
            {
                "name": x.name, "source": x.source, "checks": program.checks_of(x),
                "family": number.get(id(runtime.families.get(i))),
                **_describe_part(i, x, program, runtime),
            }
            for i, x in enumerate(program.assembly.launches)
        ],
        "layouts": [
            [i, which, x.pointers, x.cell, x.sizes]
            for (i, which), x in runtime.queued.layouts.items()
        ],
        "checks": list(runtime.queued.checks),
        "turns": runtime.queued.turns,
        "depends": runtime.queued.depends,
        "graphs": most_graphs,
        "input_extents": [to_python(e) for t in inputs for e in t.shape],
        "input_kinds": [[len(t.shape), encode_constant(t.dtype)] for t in inputs],
    }  # fmt: skip


def _tried(runtime: CudaRuntime, dims: Sequence[str]) -> Iterator[Sequence[int]]:
    evaluate = compile_evaluator(list(runtime.table.values), dims)
    for first, others in itertools.product(TRIED, repeat=2):
        shape = tuple(first if k == 0 or "_d0" in n else others for k, n in enumerate(dims))
        if runtime.tokens is None or runtime.tokens.holds(shape):
            yield evaluate(*shape)


def _describe_range(served: TokenRange) -> list[Any]:
    """Return texts of numbers of tokens, and between which ones (the first one left out) the
    largest of them is to lie; None for no end."""
    before = dict(zip(BUCKETS, (-1, *BUCKETS), strict=False))
    ends = [[before[b], None if b == BUCKETS[-1] else b] for b in sorted(served.buckets)]
    return [[to_python(e) for e in served.tokens], ends]


def _describe_part(
    i: int, launch: ir.Launch, program: Program, runtime: CudaRuntime
) -> dict[str, Any]:
    """Return what PyTorch runs of a launch, or of some of its variants."""
    if i in runtime.queued.steps:
        return {"aten": describe_step(launch, program)}
    if i not in runtime.queued.gemms:
        return {}
    called, _ = find_library_call(launch)
    windows = [None if w is None else describe_window(w, program) for w in library_operands(called)]
    fixed = runtime.queued.gemms[i][1]
    return {"gemm": {"windows": windows, "relu": runs_relu(called), "fixed": fixed}}
