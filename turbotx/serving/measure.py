"""Warm-up: measures the cost of batches on this machine, on a small grid.

In: an engine and its limits. Out: a ``CostTable``, or ``TokenCosts`` for batches without padding;
read from disk if this model was measured on this device before::

    measure_costs(engine, max_length=512, max_batch=32)     # 7 x 4 shapes, the best of 3 runs
"""

from __future__ import annotations

import logging
import math
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from turbotx.kernels.processor import processor_name
from turbotx.serving.cost import CostTable, CostTableError
from turbotx.serving.engine import BatchEngine
from turbotx.serving.token_costs import SHORT, BatchCosts, TokenCosts
from turbotx.serving.tokens import TokenRow

log = logging.getLogger(__name__)
ROUNDS = 3
LONG_MS = 300.0
TOKEN_GRID = (1, 16, 32, 64, 128, 256, 512, 1024, 4096)
TELL_S = 2.0
"""How often a measurement says how far it is."""


def length_grid(max_length: int) -> list[int]:
    """Return the lengths to measure: 1, powers of 2 from 16 on, and `max_length`."""
    return [1, *(2**k for k in range(4, 20) if 2**k < max_length), max_length][: max_length or 1]


def batch_grid(max_batch: int) -> list[int]:
    """Return the batch sizes to measure: powers of 4 below `max_batch`, and `max_batch`."""
    return [*(4**k for k in range(8) if 4**k < max_batch), max_batch]


def warm_up(engine: BatchEngine, max_length: int, token: int = 100) -> None:
    """Run a short batch: the first one captures and builds, which may take seconds."""
    engine.run([TokenRow((token,) * min(8, max_length))])


def measure_costs(
    engine: BatchEngine,
    *,
    max_length: int,
    max_batch: int,
    max_tokens: int | None = None,
    budget_ms: float = 20_000.0,
    token: int = 100,
) -> CostTable:
    """Time the engine on a grid of (length, batch), see ``time_batches``.

    The runs of a shape are spread over rounds, so that a burst of other load on the machine
    disturbs only one of them. Shapes above ``max_tokens`` padded tokens, and shapes beyond the time
    budget ``budget_ms``, are extrapolated in proportion to their tokens.
    """
    lengths, batches = length_grid(max_length), batch_grid(max_batch)
    grid = np.full((len(lengths), len(batches)), np.inf)
    places = [
        (i, j)
        for i, n in enumerate(lengths)
        for j, b in enumerate(batches)
        if b == 1 or max_tokens is None or n * b <= max_tokens
    ]
    warm_up(engine, max_length, token)
    shapes = [[lengths[i]] * batches[j] for i, j in places]
    for place, took_ms in zip(places, time_batches(engine, shapes, budget_ms, token), strict=True):
        grid[place] = took_ms
    return CostTable(lengths, batches, _extend(grid, lengths, batches))


def measure_token_costs(
    engine: BatchEngine,
    *,
    max_length: int,
    max_batch: int,
    max_tokens: int | None = None,
    budget_ms: float = 20_000.0,
    token: int = 100,
) -> TokenCosts:
    """Time an engine that packs: batches of short sequences, and single sequences with as many
    tokens, whose attention costs more. Beyond ``budget_ms`` costs are extrapolated in proportion to
    the tokens."""
    most = max(max_tokens or max_batch * max_length, max_length)
    nodes = sorted({*(n for n in TOKEN_GRID if n < most), max_length, most})
    short = [[SHORT] * (n // SHORT) + [n % SHORT] * (n % SHORT > 0) for n in nodes]
    long = [[n] for n in nodes if SHORT < n <= max_length]
    warm_up(engine, max_length, token)
    found = time_batches(engine, [*short, *long], budget_ms, token)
    took_ms = dict(zip(nodes, found, strict=False))
    pairs = {n: sum(k * k for k in lengths) for n, lengths in zip(nodes, short, strict=True)}
    alone = [(n, ms) for (n,), ms in zip(long, found[len(short) :], strict=True) if ms < np.inf]
    gaps = [(ms - took_ms[n], n * n - pairs[n]) for n, ms in alone if took_ms[n] < np.inf]
    square_ms = sum(ms * x for ms, x in gaps) / sum(x * x for _, x in gaps) if gaps else 0.0
    square_ms = max(square_ms, 0.0)
    reached = [n for n in nodes if took_ms[n] < np.inf]
    flat = [max(took_ms[n] - square_ms * pairs[n], 1e-3) for n in reached]
    flat += [flat[-1] * n / reached[-1] for n in nodes[len(reached) :]]
    return TokenCosts(nodes, flat, square_ms, max_length)


def time_batches(
    engine: BatchEngine, batches: Sequence[Sequence[int]], budget_ms: float, token: int
) -> list[float]:
    """Return the minimum ms of up to three runs of each batch of lengths; infinity beyond
    ``budget_ms``.

    Long batches run once: bursts of other load matter less there.
    """
    took = [math.inf] * len(batches)
    order = sorted(range(len(batches)), key=lambda k: sum(batches[k]))
    spent_ms, ms_per_token = 0.0, 0.0
    total, told_s = ROUNDS * len(batches), time.perf_counter()
    log.info("measuring costs: %d shapes, up to %d times each", len(batches), ROUNDS)
    for done, k in enumerate(order * ROUNDS):
        if time.perf_counter() - told_s > TELL_S:
            log.info("measuring costs %d/%d", done, total)
            told_s = time.perf_counter()
        tokens = sum(batches[k])
        # One long batch may take as long as all others together.
        over = spent_ms + tokens * ms_per_token > budget_ms and math.isfinite(took[order[0]])
        if over or LONG_MS < took[k] < math.inf:
            continue
        took_ms = time_ms(engine, [TokenRow((token,) * n) for n in batches[k]])
        took[k] = min(took[k], took_ms)
        spent_ms += took_ms
        ms_per_token = took_ms / tokens
    return took


def _extend(grid: np.ndarray, lengths: list[int], batches: list[int]) -> np.ndarray:
    """Fill unmeasured nodes in proportion to padded tokens, from the largest measured shape
    inside."""
    full = grid.copy()
    for i, j in zip(*np.where(np.isinf(grid)), strict=True):
        inside = [
            (lengths[k] * batches[m], grid[k, m])
            for k in range(i + 1)
            for m in range(j + 1)
            if np.isfinite(grid[k, m])
        ]
        tokens, took_ms = max(inside)
        full[i, j] = took_ms * lengths[i] * batches[j] / tokens
    return full


def time_ms(engine: BatchEngine, rows: Sequence[TokenRow]) -> float:
    """Run a batch once; return its ms, above zero."""
    begin = time.perf_counter()
    engine.run(rows)
    return max((time.perf_counter() - begin) * 1e3, 1e-3)


def load_or_measure(
    path: Path | None,
    engine: BatchEngine,
    *,
    max_length: int,
    max_batch: int,
    max_tokens: int | None,
    token: int = 100,
    packed: bool = False,
) -> BatchCosts:
    """Return the costs saved at ``path`` if they cover the limits, else measure them.

    packed: for batches without padding."""
    most = max(max_tokens or max_batch * max_length, max_length)
    if path is not None and path.exists():
        try:
            if packed:
                costs = TokenCosts.load(path)
                if (costs.max_length, costs.max_tokens) == (max_length, most):
                    return costs
            else:
                table = CostTable.load(path)
                if (table.max_length, table.max_batch) == (max_length, max_batch):
                    return table
        except CostTableError:
            pass  # unreadable: measure again and overwrite
    measure = measure_token_costs if packed else measure_costs
    found: BatchCosts = measure(
        engine, max_length=max_length, max_batch=max_batch, max_tokens=max_tokens, token=token
    )
    return found


def describe_device(device: str) -> str:
    """Return the machine's name, part of the table's file name."""
    import torch

    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine()} {processor_name()} {torch.get_num_threads()} threads"


def cost_file(folder: Path, model: str, revision: str, device: str, backend: str) -> Path:
    """Return the path of a cost table: one file per model, backend and device."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{model}-{revision}-{backend}-{device}").strip("-")
    return folder / f"costs-{name}.json"
