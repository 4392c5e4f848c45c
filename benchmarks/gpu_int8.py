"""The stages of `gpu.py` over quantised products: right, how fast beside the float program.

In: `emit(name, numbers)` and a stage's arguments. Out: rows such as::

    right/fp8-minilm/fp16              {"holds": true, "worst": 0.6, "mean_cosine": 0.9991, ...}
    int8/bert-base/fp16/32x128/int8    {"latency_us": ..., "replay_us": ..., "kernels": {...}}
"""

from __future__ import annotations

from typing import Any

import torch
from gpu_plans import DRY, FEWER, HEAD, MANY, Shape, label
from gpu_session import Session
from gpu_stages import ALTERNATING, Emit
from gpu_timing import kernel_times, time_call, time_replay

import turbotx

KINDS = ("int8", "fp8")
WAYS: dict[str, dict[str, Any]] = {"float": {}, **{kind: {"quantize": kind} for kind in KINDS}}


def int8_right(
    emit: Emit, name: str, dtype: str, layers: int | None = None, kind: str = "int8"
) -> None:
    """Every launch against the same numbers in float64, and the outputs beside the float model's;
    plain, captured and replayed calls give the same bits."""
    session = Session(name, dtype, layers, quantize=kind)
    rows: dict[str, Any] = {}
    for shape in ALTERNATING:
        inputs = session.inputs(shape, padded=True)
        first, *more = (session.fast(**inputs)[0] for _ in range(3))
        rows[label(shape)] = {"repeats": all(torch.equal(first, other) for other in more)}
    for shape in (HEAD,) if DRY else (HEAD, ALTERNATING[-1]):
        inputs = session.inputs(shape)
        numerics = turbotx.explain(session.fast, **inputs).numerics(session.fast, **inputs)
        worst = max(numerics.launches, key=lambda e: (not e.holds, e.turbotx / (e.allowed or 1.0)))
        rows[f"{label(shape)}, launch by launch"] = {
            "repeats": numerics.holds,
            "worst": worst.turbotx / (worst.allowed or 1.0), "launch": worst.name,
            "mean_cosine": numerics.likenesses[0].mean,
            "worst_cosine": numerics.likenesses[0].worst,
        }  # fmt: skip
    stats = session.fast.stats()
    emit(
        f"right/{kind}-{name}/{dtype}",
        {
            "holds": all(row["repeats"] for row in rows.values()) and stats["captures"] == 1,
            "worst": max(row.get("worst", 0.0) for row in rows.values()),
            "captures": stats["captures"], "builds": stats["kernel_builds"],
            "graphs": stats["graph_captures"], "rows": rows,
        },
    )  # fmt: skip


def int8_times(
    emit: Emit, name: str, dtype: str, shapes: tuple[Shape, ...] = FEWER
) -> None:  # fmt: skip
    """Calls and bare replays of all programs; what each kernel takes, of few and many tokens."""
    sessions = {way: Session(name, dtype, **options) for way, options in WAYS.items()}
    for shape in shapes[:2] if DRY else shapes:
        for way, session in sessions.items():  # side by side
            inputs, fast = session.inputs(shape), session.fast
            row: dict[str, Any] = time_call(lambda fast=fast, inputs=inputs: fast(**inputs))  # type: ignore[misc]
            replay = session.bind(shape, **WAYS[way]).replay()
            row["replay_us"] = time_replay(replay)
            if shape in (HEAD, MANY):
                found = kernel_times(replay)
                row["kernels"] = {
                    n: {"us": round(us, 3), "launches": count} for n, (us, count) in found.items()
                }
            emit(f"int8/{name}/{dtype}/{label(shape)}/{way}", row)
