"""The stages of `gpu.py` over batches of mixed lengths: packed, padded, and what others take.

In: `emit(name, numbers)` and a stage's arguments. Out: rows such as::

    right/packed-minilm/fp16           {"holds": true, "worst": 0.41, "captures": 1, ...}
    packed/minilm/fp16/32xU(5,500)/packed   {"latency_us": ..., "us_a_token": ...}
    packed-stream/minilm/fp16          {"mean_us": ..., "grown": {"graph_captures": 31, ...}}
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from gpu_models import DTYPES, find_worst, make_call, make_model
from gpu_plans import DRY
from gpu_stages import Emit
from gpu_timing import DEVICE, time_call, time_replay
from packed import take_lengths
from torch import nn

import turbotx
from turbotx.engine.optimize import engine_of

LONGEST = 20 if DRY else 500
BATCH = 3 if DRY else 32
PLACE = f"32xU(5,{LONGEST})"


def take_mixtures(count: int, least: int, seed: int = 0) -> list[list[int]]:
    """Lengths of random batches of 1 to 32 texts of `least` to 500 tokens each."""
    numbers = random.Random(seed)
    sizes = [numbers.randint(1, BATCH) for _ in range(count)]
    return [[numbers.randint(least, LONGEST) for _ in range(size)] for size in sizes]


def flat_ids(lengths: Sequence[int], seed: int = 0) -> torch.Tensor:
    made = torch.randint(3, 1000, (sum(lengths),), generator=torch.manual_seed(seed))
    return made.to(DEVICE)


def padded(lengths: Sequence[int], flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same texts as a padded call, filled up on the right."""
    width = max(1, *lengths)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long().to(DEVICE)
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = flat
    return {"input_ids": ids, "attention_mask": mask}


def packed_right(emit: Emit, name: str, dtype: str, count: int = 8) -> None:
    """Random mixtures, with empty texts and texts of one token among them, against every text by
    itself in float64: plainly, captured, replayed, padded, and with lengths on the device."""
    model = make_model(name, DTYPES[dtype])
    fast = turbotx.optimize(model, padding="packed")
    exact = copy.deepcopy(model).double()
    mixtures = [[0, 1, *lengths] for lengths in take_mixtures(2 if DRY else count, 0)]
    mixtures += [[1], [0, 0], [LONGEST], [40]]
    rows = {}
    for k, lengths in enumerate(mixtures):
        rows[f"{k}: {len(lengths)} texts, {sum(lengths)} tokens"] = check(
            model, exact, fast, lengths
        )
    stats = fast.stats()
    emit(
        f"right/packed-{name}/{dtype}",
        {
            "holds": all(row["holds"] for row in rows.values()) and stats["captures"] == 1,
            "worst": max(row["turbotx"] / row["allowed"] for row in rows.values()),
            "captures": stats["captures"], "builds": stats["kernel_builds"],
            "graphs": stats["graph_captures"], "rows": rows,
        },
    )  # fmt: skip


@torch.no_grad()
def check(model: nn.Module, exact: nn.Module, fast: Any, lengths: list[int]) -> dict[str, Any]:
    """The largest errors of one mixture, by the rule of all tests."""
    flat = flat_ids(lengths)
    ways = list(_ways(fast, lengths, flat))
    if DRY or not sum(lengths):  # of no token there is nothing to compare
        return {"eager": 1.0, "turbotx": 0.0, "allowed": 1.0, "way": "", "holds": True}
    own, true = (_one_by_one(m, lengths, flat) for m in (model, exact))
    worst: dict[str, Any] = {"holds": True, "turbotx": 0.0}
    for way, found in ways:
        worst = find_worst(worst, found, own, true, way=way)
    return worst


def _one_by_one(model: nn.Module, lengths: list[int], flat: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states by token and pooled ones by text, of every text that is not empty."""
    outputs = []
    for ids in flat.split(lengths):
        if ids.shape[0]:
            mask = torch.ones_like(ids)
            outputs.append(model(input_ids=ids[None], attention_mask=mask[None]))
    hidden = torch.cat([x.last_hidden_state[0] for x in outputs])
    return [hidden, torch.cat([x.pooler_output for x in outputs])]


def _ways(
    fast: Any, lengths: list[int], flat: torch.Tensor
) -> Iterator[tuple[str, list[torch.Tensor]]]:
    there = [k for k, n in enumerate(lengths) if n]
    on_device = torch.tensor(lengths, device=DEVICE)
    given = padded(lengths, flat)
    for run in ("plain", "captured", "replayed"):
        out = fast.packed(input_ids=flat, lengths=lengths)
        yield run, [out.last_hidden_state, out.pooler_output[there]]
    out = fast.packed(input_ids=flat, lengths=on_device, longest=max(1, *lengths))
    yield "lengths on the device", [out.last_hidden_state, out.pooler_output[there]]
    out, shown = fast(**given), given["attention_mask"].bool()
    if not DRY:
        assert not out.last_hidden_state[~shown].any(), "rows of padding are not zeros"
    yield "padded", [out.last_hidden_state[shown], out.pooler_output[there]]


def packed_times(emit: Emit, name: str, dtype: str) -> None:
    """One batch of 32 texts of 5 to 500 tokens: packed in each way, padded, eager; and as many
    tokens of equal lengths, which pad nothing."""
    model = make_model(name, DTYPES[dtype])
    lengths = _lengths()
    flat, tokens = flat_ids(lengths), sum(lengths)
    given, on_device = padded(lengths, flat), torch.tensor(lengths, device=DEVICE)
    packed, plain = turbotx.optimize(model, padding="packed"), turbotx.optimize(model)
    mean = tokens // len(lengths)
    even = padded([mean] * len(lengths), flat[: mean * len(lengths)])
    ways: dict[str, Callable[[], Any]] = {
        "packed": partial(packed.packed, input_ids=flat, lengths=lengths),
        "packed-device-lengths": partial(
            packed.packed, input_ids=flat, lengths=on_device, longest=max(lengths)
        ),
        "packed-by-mask": partial(packed, **given),
        "padded": partial(plain, **given),
        "equal-lengths": partial(plain, **even),
    }

    def measure(way: str, call: Callable[[], Any]) -> None:
        row = time_call(call)
        row["us_a_token"] = round(row["row_us"] / tokens, 4)
        emit(f"packed/{name}/{dtype}/{PLACE}/{way}", {"tokens": tokens, "mean": mean, **row})

    for way, call in ways.items():
        measure(way, call)
    for way, fast in (("packed", packed), ("padded", plain)):
        kept = [g for p in engine_of(fast).variants()[0].programs for g in p.graphs.kept.items()]
        (_, dims), graph = max(kept, key=lambda g: g[0][1])
        replay_us = time_replay(graph.graph.replay)
        emit(f"packed/{name}/{dtype}/{PLACE}/replay-{way}", {"dims": dims, "replay_us": replay_us})
    for engine in ("eager", "eager-graphs"):
        measure(engine, make_call(engine, model, given))


def packed_baseline(emit: Emit, name: str, dtype: str, engine: str, timed: bool = True) -> None:
    """torch.compile in one mode on the padded batch; not `timed`: only fill its cache on disk."""
    model, lengths = make_model(name, DTYPES[dtype]), _lengths()
    begin = time.perf_counter()
    call = make_call(engine, model, padded(lengths, flat_ids(lengths)))
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    row: dict[str, Any] = {"ready_s": round(time.perf_counter() - begin, 2)}
    if timed:
        row |= time_call(call)
        row["us_a_token"] = round(row["row_us"] / sum(lengths), 4)
    kind = "packed" if timed else "warm/packed"
    emit(f"{kind}/{name}/{dtype}/{PLACE}/{engine}", row)


def packed_stream(emit: Emit, name: str, dtype: str, requests: int = 1000) -> None:
    """Random mixtures in a row: what is captured, built and allocated, and what they take."""
    model = make_model(name, DTYPES[dtype])
    fast = turbotx.optimize(model, padding="packed")
    most = [LONGEST] * BATCH
    for _ in range(3):
        fast.packed(input_ids=flat_ids(most), lengths=most)
    torch.cuda.synchronize()
    given = [(flat_ids(n, k), n) for k, n in
             enumerate(take_mixtures(4 if DRY else requests, 0)) if sum(n)]  # fmt: skip
    before, mallocs = fast.stats(), torch.cuda.memory_stats()["num_device_alloc"]
    passes = []
    for _ in range(2):  # the second replays what the first has captured
        singles = []
        for flat, lengths in given:
            begin = time.perf_counter()
            fast.packed(input_ids=flat, lengths=lengths)
            torch.cuda.synchronize()
            singles.append((time.perf_counter() - begin) * 1e6)
        passes.append(_quantiles(singles))
    after = fast.stats()
    tokens = [sum(n) for _, n in given]
    emit(
        f"packed-stream/{name}/{dtype}",
        {
            "mixtures": len(given), "tokens": [min(tokens), max(tokens)],
            "graphs": after["graph_captures"], "captures": after["captures"],
            "first": passes[0], "again": passes[1],
            "allocations_by_pytorch": torch.cuda.memory_stats()["num_device_alloc"] - mallocs,
            "grown": {k: after[k] - before[k] for k in after}, "stats": after,
        },
    )  # fmt: skip


def _quantiles(singles: list[float]) -> dict[str, float]:
    ordered = sorted(singles)
    return {
        "mean_us": round(statistics.mean(ordered), 1),
        "p50_us": round(ordered[len(ordered) // 2], 1),
        "p99_us": round(ordered[len(ordered) * 99 // 100], 1),
    }


def _lengths() -> list[int]:
    return [5, 12, LONGEST] if DRY else take_lengths("uniform", BATCH)
