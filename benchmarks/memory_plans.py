"""The plans of the compiler's own launches, for the models of docs/architectures.md, by layers.

In: names of architectures and numbers of layers. Out: for each how long its plan took to solve, and
how far it is above the lower bound at the worst of some shapes::

    plan_architectures(["bloom"], [48])  ->  {"model": "bloom", "solve_s": 0.14, "worst": 1.0, ...}
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
    for batch, seq in SHAPES:
        given = {"batch": batch, "seq": seq}
        named = zip(captured.dims, captured.example_dims, strict=True)
        plan = program.plan([given.get(dim, value) for dim, value in named])
        worst = max(worst, plan.peak_nbytes / max(1, plan.lower_bound_nbytes))
    return {"buffers": len(program.liveness.names), "solve_s": sum(taken), "worst": worst}
