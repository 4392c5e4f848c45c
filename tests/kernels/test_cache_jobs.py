"""Flash decoding over a cache: in Triton's interpreter, and compiled.

In: few queries of grouped heads, keys in one part and in many, everything that hides or changes
scores. Out: the op's own meaning in float64; no spills, accesses of 128 bits.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.kernels.triton.attention_runner import check, launch, operands
from turbotx.ir.matmul_kernels import AttentionKernel
from turbotx.kernels.cache_jobs import (
    PROGRAMS,
    STORE_STRIDES,
    StoreSchedule,
    choose_split,
    split_job,
    split_workspace_size,
    store_job,
)
from turbotx.kernels.triton.attention import STRIDES
from turbotx.kernels.triton.cells import read_cells
from turbotx.kernels.triton.compiler import TARGETS, build


def run_split(kernel: AttentionKernel, parts: int, q: Any, k: Any, v: Any, *given: Any) -> Any:
    """Run the printed kernel with keys in so many parts; given: keys, bias, sinks."""
    batch, heads, q_len, width = q.shape
    kv_heads, k_len = k.shape[1:3]
    chosen = choose_split(kernel, heads // kv_heads, batch, kv_heads, q_len, k_len)
    assert chosen is not None
    schedule = replace(chosen, k_tile=16, parts=parts, added=2)
    job = split_job(kernel, heads // kv_heads, "sm_90", schedule, ())
    out = torch.full((batch, q_len, heads, width), float("nan"), dtype=q.dtype)
    sizes = [batch, heads, kv_heads, q_len, k_len]
    sizes += [step for t in (q, k, v) for step in t.stride()[:3]]
    sizes += [out.stride(0), out.stride(2), out.stride(1)]
    keys, bias, _ = given
    sizes.append(keys.stride(0) if kernel.keys == "mask" else 0)
    full = None if bias is None else bias.expand(batch, heads, q_len, k_len)
    sizes += [0] * 4 if full is None else full.stride()
    sums = torch.full((split_workspace_size(kernel),), float("nan"))
    turns = torch.zeros(batch * kv_heads, dtype=torch.int32)
    pointers = [t for t in (q, k, v, out, *given) if t is not None]
    pointers += [sums, turns] if parts > 1 else []
    launch(job.source, job.name, (parts, kv_heads, batch), (*pointers, *sizes),
           dict(job.constexprs))  # fmt: skip
    assert not turns.any()
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


@pytest.mark.parametrize("parts", [1, 2, 5])
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
    out = run_split(kernel, parts, q, k, v, keys, bias, sinks)
    meant = {name: x for name, x in said.items() if name not in ("keys", "bias", "sinks")}
    check(out, q, k, v, keys, bias, sinks, scale=0.3, **meant)


def test_parts_fill_a_device_and_no_more() -> None:
    kernel = AttentionKernel(torch.float16, 64, 0.125, True, late=True)
    few = choose_split(kernel, 4, 1, 8, 1, 1024)
    many = choose_split(kernel, 4, 64, 8, 1, 1024)
    assert few is not None and few.parts == 16 and few.rows == 4
    assert many is not None and many.parts == 1 and many.parts * 64 * 8 >= PROGRAMS
    assert choose_split(kernel, 4, 1, 8, 40, 1024) is None  # a prompt


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target: str) -> None:
    moving = ("k_len", "key_mask_stride", "k_ptr", "v_ptr")
    jobs = []
    for group, keys in ((1, "mask"), (4, "all")):
        kernel = AttentionKernel(torch.float16, 64, 1 / math.sqrt(64), True, keys=keys, late=True)
        schedule = choose_split(kernel, group, 1, 8, 1, 1024)
        assert schedule is not None
        jobs.append(split_job(kernel, group, target, schedule, STRIDES, cells=moving))
    narrow = AttentionKernel(torch.float32, 16, 0.25, True, "boolean", late=True)
    schedule = choose_split(narrow, 16, 1, 8, 1, 1024)
    assert schedule is not None
    jobs.append(split_job(narrow, 16, target, schedule, STRIDES, cells=moving))
    rows = StoreSchedule(16)
    cells = ("first", "held_ptr")
    jobs.append(store_job(torch.float16, 64, target, rows, STORE_STRIDES, cells=cells))
    for built in build(map(read_cells, jobs)):
        assert built.resources.spills == 0, built.resources
        assert built.resources.load_bits >= 128, built.resources
