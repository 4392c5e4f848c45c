"""The plans of the compiler's own launches, for the models of docs/architectures.md, by layers.

In: names of architectures and numbers of layers. Out: for each how long its plan took to solve, and
how far it is above the lower bound at the worst of some shapes::

    plan_architectures(["bloom"], [48])  ->  {"model": "bloom", "solve_s": 0.14, "worst": 1.0, ...}

Also the bytes of a call of one text of 2,048 tokens, and those of its largest buffer for pairs of
tokens, which grows more than 3 times where the length doubles; 0 if there is none.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from parity import ARCHITECTURES, make_inputs, make_model

import turbotx
from turbotx.engine.optimize import engine_of
from turbotx.program import link

SHAPES = ((1, 1), (2, 17), (7, 2), (3, 40), (1, 384), (16, 64))
LAYERS = (2, 12, 24, 48)
LONG = 2048


def plan_architectures(
    names: Sequence[str] = ARCHITECTURES, layers: Sequence[int] = LAYERS
) -> Iterator[dict[str, Any]]:
    """Compile each model, of 64 channels, and give a row for its plan; solve_s in seconds of
    processor time, worst over the shapes."""
    for name in names:
        for count in layers:
            yield {"model": name, "layers": count, **_plan(name, count)}


def _plan(name: str, layers: int) -> dict[str, Any]:
    taken, solve = [], link.find_orientations

    def timed(*args: Any) -> Any:
        begin = time.process_time()
        found = solve(*args)
        taken.append(time.process_time() - begin)
        return found

    # Buffers are the same whoever runs the kernels, and PyTorch's ops need no compiler.
    engine = engine_of(turbotx.optimize(make_model(name, layers, small=True), backend="aten"))
    captured = engine.capture((), make_inputs(engine.model, 2, 8, torch.float32))
    link.find_orientations = timed
    try:
        program, worst = engine.compile(captured).program, 0.0
    finally:
        link.find_orientations = solve

    def dims_at(batch: int, seq: int) -> list[int]:
        given = {"batch": batch, "seq": seq}
        named = zip(captured.dims, captured.example_dims, strict=True)
        return [given.get(dim, value) for dim, value in named]

    for batch, seq in SHAPES:
        plan = program.plan(dims_at(batch, seq))
        worst = max(worst, plan.peak_nbytes / max(1, plan.lower_bound_nbytes))
    half, whole = (program.sizes_at(dims_at(1, n)) for n in (LONG // 2, LONG))
    pairs = [n for name, n in whole.items() if n > 3 * half[name]]
    return {
        "buffers": len(program.liveness.names), "solve_s": sum(taken), "worst": worst,
        "long_nbytes": program.plan(dims_at(1, LONG)).peak_nbytes,
        "largest_of_pairs_nbytes": max(pairs, default=0),
    }  # fmt: skip
