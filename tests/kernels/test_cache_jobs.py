"""Attention over a cache that gets the new rows: in Triton's interpreter, and compiled.

In: queries of grouped heads, what a cache holds in blocks, new rows, keys in one part and in many,
everything that hides or changes scores. Out: the op's own meaning in float64, and the new rows
behind the others; no spills, accesses of 128 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.kernels.triton.attention_runner import check, launch, operands
from turbotx.ir.matmul_kernels import AttentionKernel
from turbotx.kernels.attention_jobs import attention_job
from turbotx.kernels.cache_jobs import PROGRAMS, choose_split, split_job, split_workspace_size
from turbotx.kernels.triton.attention import STRIDES, AttentionSchedule, attention_grid
from turbotx.kernels.triton.cells import read_cells
from turbotx.kernels.triton.compiler import TARGETS, build


@dataclass
class Cache:
    """Keys and values that a cache holds, and its memory: blocks in any order, and their tables."""

    k: torch.Tensor
    v: torch.Tensor
    memory: torch.Tensor
    tables: torch.Tensor
    block_len: int

    def rows(self, part: int, count: int) -> torch.Tensor:
        """The first rows that the memory holds of all keys or of all values."""
        heads, width = self.k.shape[1], self.k.shape[3]
        size = heads * self.block_len * width
        found = [
            torch.cat([self.memory[at : at + size].view(heads, -1, width) for at in row], 1)
            for row in self.tables[part].tolist()
        ]
        return torch.stack(found)[:, :, :count]


def make_cache(
    k: torch.Tensor, v: torch.Tensor, room: int, block_len: int = 64, before: int = 0
) -> Cache:
    """Lay out what a cache holds in blocks with room for so many rows, behind so many elements that
    are never touched; what is in none is NaN."""
    batch, heads, past, width = k.shape
    columns = -(-room // block_len)
    size, count = heads * block_len * width, 2 * batch * columns
    order = torch.randperm(count + 3, generator=torch.Generator().manual_seed(past))[:count]
    memory = torch.empty(before + (count + 3) * size, dtype=k.dtype)
    memory[before:] = float("nan")
    made = Cache(k, v, memory, (before + order * size).view(2, batch, columns), block_len)
    for part, held in enumerate((k, v)):
        for row in range(batch):
            for column in range(-(-past // block_len)):
                rows = held[row, :, column * block_len : (column + 1) * block_len]
                at = int(made.tables[part, row, column])
                block = memory[at : at + size].view(heads, block_len, width)
                block[:, : rows.shape[1]] = rows
    return made


def run_cached(
    kernel: AttentionKernel, cache: Cache, q: Any, k: Any, v: Any, *given: Any, parts: int = 0
) -> Any:
    """Run the printed kernel over a cache that gets k and v: keys in so many parts, or with 0 the
    kernel of many queries; given: keys, bias, sinks."""
    batch, heads, q_len, width = q.shape
    kv_heads, k_len = k.shape[1], cache.k.shape[2] + q_len
    kernel, group = replace(kernel, cached=True), heads // kv_heads
    out = torch.full((batch, q_len, heads, width), float("nan"), dtype=q.dtype)
    sizes = [batch, heads, kv_heads, q_len, k_len]
    sizes += [step for t in (q, k, v) for step in t.stride()[:3]]
    sizes += [out.stride(0), out.stride(2), out.stride(1)]
    keys, bias, _ = given
    sizes.append(keys.stride(0) if kernel.keys == "mask" else 0)
    full = None if bias is None else bias.expand(batch, heads, q_len, k_len)
    sizes += [0] * 4 if full is None else full.stride()
    sizes += [cache.tables.shape[2], cache.block_len]
    pointers = [t for t in (q, k, v, out, *given, cache.memory, *cache.tables) if t is not None]
    turns = torch.zeros(batch * kv_heads, dtype=torch.int32)
    if parts:
        chosen = choose_split(kernel, group, batch, kv_heads, q_len, k_len)
        assert chosen is not None
        schedule = replace(chosen, k_tile=16, parts=parts, added=2)
        job, grid = split_job(kernel, group, "sm_90", schedule, ()), (parts, kv_heads, batch)
        if parts > 1:
            pointers += [torch.full((split_workspace_size(kernel),), float("nan")), turns]
    else:
        tiles = AttentionSchedule(16, 16)
        job, grid = (
            attention_job(kernel, "sm_90", tiles, ()),
            attention_grid(tiles, batch, heads, q_len),
        )
    launch(job.source, job.name, grid, (*pointers, *sizes), dict(job.constexprs))
    assert not turns.any()
    for part, new in enumerate((k, v)):
        held = (cache.k, cache.v)[part]
        assert torch.equal(cache.rows(part, k_len), torch.cat([held, new], 2))
    return out


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "late": {"late": True, "causal": True},
    "window": {"late": True, "causal": True, "window": (6, -1)},
    "mask": {"keys": "mask"},
    "lengths": {"keys": "lengths", "blind_nan": True},
    "mean": {"keys": "mask", "blind_mean": True},
    "boolean": {"bias": "boolean", "late": True, "causal": True},
    "numbers": {"bias": "float32", "softcap": 3.0},
    "sinks": {"sinks": True, "keys": "mask"},
}


@pytest.mark.parametrize("parts", [0, 1, 2, 5])
@pytest.mark.parametrize("case", CASES)
def test_parts_of_keys_are_added_to_the_whole(case: str, parts: int) -> None:
    torch.manual_seed(0)
    said = CASES[case]
    kernel = AttentionKernel(torch.float32, 12, 0.3, **{"causal": False, **said})
    q, k, v = operands(3, 4, 2, 3, 37, 12)
    counts = torch.tensor([37, 20, 0])
    keys = {
        "all": None, "lengths": counts, "mask": torch.arange(37)[None] < counts[:, None],
    }[kernel.keys]  # fmt: skip
    bias = None if kernel.bias == "none" else torch.randn(1, 4, 3, 37)
    bias = bias > -0.5 if bias is not None and kernel.bias == "boolean" else bias
    sinks = torch.randn(4) if kernel.sinks else None
    cache = make_cache(k[:, :, :34], v[:, :, :34], 64, 32)
    new = [x[:, :, 34:] for x in (k, v)]
    out = run_cached(kernel, cache, q, *new, keys, bias, sinks, parts=parts)
    meant = {name: x for name, x in said.items() if name not in ("keys", "bias", "sinks")}
    check(out, q, k, v, keys, bias, sinks, scale=0.3, **meant)


@pytest.mark.parametrize("past", [0, 1, 63, 64, 65, 300])
@pytest.mark.parametrize("window", [None, 70])
def test_any_length_of_what_is_held(past: int, window: int | None) -> None:
    """Queries of grouped heads behind blocks in any order, some of them let go by the window."""
    torch.manual_seed(past)
    said: dict[str, Any] = {"causal": True, "late": True}
    said |= {"window": (window - 1, -1)} if window else {}
    kernel = AttentionKernel(torch.float32, 16, 0.25, **said)
    for batch, q_len, parts in ((1, 1, 3), (3, 1, 1), (3, 2, 2), (1, 19, 0), (3, 70, 0)):
        q, k, v = operands(batch, 4, 2, q_len, past + q_len + (past == 0), 16)
        k, v = k[:, :, : past + q_len], v[:, :, : past + q_len]
        cache = make_cache(k[:, :, :past], v[:, :, :past], past + q_len)
        if window is not None and past > 200:  # as `BlockMemory` shows cells without a block
            gone = (past - window - 64) // 64
            cache.tables[:, :, :gone] = cache.tables[:, :, gone : gone + 1]
            cache.k[:, :, : gone * 64] = cache.rows(0, gone * 64)
            cache.v[:, :, : gone * 64] = cache.rows(1, gone * 64)
        new = [x[:, :, past:] for x in (k, v)]
        out = run_cached(kernel, cache, q, *new, None, None, None, parts=parts)
        check(out, q, k, v, scale=0.25, **said)


@pytest.mark.parametrize("parts", [0, 2])
def test_blocks_lie_farther_than_32_bits_count(parts: int) -> None:
    torch.manual_seed(0)
    kernel = AttentionKernel(torch.float16, 16, 0.25, True, late=True)
    q, k, v = operands(2, 4, 2, 2, 70, 16, torch.float16)
    cache = make_cache(k[:, :, :68], v[:, :, :68], 70, before=1 << 31)
    new = [x[:, :, 68:] for x in (k, v)]
    out = run_cached(kernel, cache, q, *new, None, None, None, parts=parts)
    check(out, q, k, v, scale=0.25, causal=True, late=True)


def test_parts_fill_a_device_and_no_more() -> None:
    kernel = AttentionKernel(torch.float16, 64, 0.125, True, late=True)
    few = choose_split(kernel, 4, 1, 8, 1, 1024)
    many = choose_split(kernel, 4, 64, 8, 1, 1024)
    assert few is not None and few.parts == 16 and few.rows == 4
    assert many is not None and many.parts == 1 and many.parts * 64 * 8 >= PROGRAMS
    assert choose_split(kernel, 4, 1, 8, 40, 1024) is None  # a prompt


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target: str) -> None:
    moving = ("k_len", "key_mask_stride", "cache_ptr")
    jobs = []
    for group, keys in ((1, "mask"), (4, "all")):
        kernel = AttentionKernel(
            torch.float16, 64, 1 / math.sqrt(64), True, keys=keys, late=True, cached=True
        )
        schedule = choose_split(kernel, group, 1, 8, 1, 1024)
        assert schedule is not None
        jobs.append(split_job(kernel, group, target, schedule, STRIDES, cells=moving))
    jobs.append(attention_job(kernel, target, divisible=STRIDES, cells=moving))
    narrow = AttentionKernel(torch.float32, 16, 0.25, True, "boolean", late=True, cached=True)
    schedule = choose_split(narrow, 16, 1, 8, 1, 1024)
    assert schedule is not None
    jobs.append(split_job(narrow, 16, target, schedule, STRIDES, cells=moving))
    found = build([read_cells(job) for job in jobs])
    assert len(found) == 4
    for built in found:
        assert built.resources.spills == 0, built.resources
        assert built.resources.load_bits >= 128, built.resources
