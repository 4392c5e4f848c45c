"""Describe: a compiled call as JSON: its executable, the sizes it serves, its weights, its output.

In: a compiled call, whose program is plain data. Out: the JSON from which `saved.load` makes a
program; for a GPU, its kernels as tables of variants::

    {"executable": {"is": "Executable", "dims": ["batch", "seq"], ...}, "sizes": {...}, ...}
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch.utils._pytree as pytree

from turbotx.engine.compiled import Compiled
from turbotx.errors import SaveError
from turbotx.passes.pack import PackedCapture
from turbotx.runtime.cuda.runtime import LaunchKernels
from turbotx.runtime.weights import Weights
from turbotx.saved.codec import encode, encode_nodes
from turbotx.saved.values import Leaf, encode_ambient, encode_tree
from turbotx.saved.variants import Tabulator, Variants, check_table

# Sizes of every dim at which a file's tables are compared with the program they were made from.
TRIED = (1, 3, 16, 40, 96, 500, 1024, 5000)


def describe_call(compiled: Compiled) -> dict[str, Any]:
    """Return a compiled call as JSON; raise SaveError if it cannot be saved."""
    program, captured = compiled.program, compiled.captured
    if captured.effects:
        left = ", ".join(repr(effect.text) for effect in captured.effects)
        raise SaveError(
            f"{captured.name} cannot be saved: its call leaves something in {left}, which a saved "
            "model does not have. Return it instead"
        )
    out = pytree.tree_unflatten(
        [Leaf(k) for k in range(captured.out_spec.num_leaves)], captured.out_spec
    )
    return {
        "executable": encode(program.executable),
        "sizes": encode(captured.matcher.rules),
        "floats": encode(captured.floats),
        "decisions": encode(captured.decisions),
        "packing": encode(captured.packing) if isinstance(captured, PackedCapture) else None,
        "ambient": encode_ambient(captured.ambient, captured.asked),
        "out": encode_tree(out),
        "returned": [[list(x.given), list(x.made), x.changed] for x in captured.returned],
        "weights": _describe_weights(program.runtime.weights),
    }


def describe_families(compiled: Compiled, variants: Variants) -> list[dict[str, Any]]:
    """Return the kernels of a GPU call as tables, and add the kernels to `variants`."""
    kernels = compiled.specialization.code
    assert isinstance(kernels, LaunchKernels)
    tabulator = Tabulator(kernels, variants)
    tables = [tabulator.tabulate(f) for f in kernels.in_order]
    for family, table in zip(kernels.in_order, tables, strict=True):
        whole = replace(table, variants=variants.jobs)
        check_table(family, whole, kernels.adapt, _sizes_to_try(compiled))
    return [table.to_json() for table in tables]


def _sizes_to_try(compiled: Compiled) -> Iterator[tuple[int, ...]]:
    program = compiled.program
    evaluate = program.executable.values.compile(program.dims)
    gpu = program.executable.gpu
    cells = None if gpu is None else gpu.cells
    full = set() if cells is None else {*cells.growing, *cells.room}
    for first, others, room in itertools.product(TRIED, TRIED, TRIED if full else TRIED[:1]):
        shape = tuple(
            room if k in full else first if k == 0 or "_d0" in n else others
            for k, n in enumerate(program.dims)
        )
        if program.serves(shape):
            yield evaluate(*shape)


def _describe_weights(weights: Weights) -> dict[str, Any]:
    return {
        "paths": dict(weights.paths),
        "kinds": encode(weights.kinds),
        "hoisted": encode_nodes(weights.hoisted.values()),
        "hoisted_names": list(weights.hoisted),
    }
