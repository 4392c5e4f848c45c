"""What a launch compiles for a GPU at one shape, without a device or a program.

In: a launch, a target, dims. Out: a `Job` with the tiles that the target's heuristics give and the
divisibility that these dims have; None for what PyTorch's own kernels do::

    launch_job(launch, "sm_90", {"batch": 1, "seq": 128})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from turbotx import ir
from turbotx.ir.expr import evaluate
from turbotx.kernels.attention_jobs import attention_job, product_job
from turbotx.kernels.heuristics import heuristics_for
from turbotx.kernels.job import ALIGNED_NBYTES, Job
from turbotx.kernels.schedule import choose_schedule, divisible_sizes
from turbotx.kernels.triton.attention import (
    NAMES,
    STRIDES,
    choose_attention_schedule,
    with_keys,
)
from turbotx.kernels.triton.compiler import kernel_job
from turbotx.kernels.triton.products import (
    PRODUCT_NAMES,
    PRODUCT_STRIDES,
    choose_product_schedule,
)


def launch_job(
    launch: ir.Launch, target: str, dims: Mapping[str, int], name: str | None = None
) -> Job | None:
    """Return the job of a launch of a generated kernel, under `name` where one is given."""
    if isinstance(launch, ir.KernelLaunch):
        made = launch.kernel
        sizes = [s for s in divisible_sizes(made) if dims[s] % 16 == 0]
        schedule = choose_schedule(made, dims, heuristics_for(target))
        return kernel_job(replace(made, name=name or made.name), target, schedule, sizes)
    if isinstance(launch, ir.AttentionLaunch):
        keys = evaluate(launch.sizes[NAMES.index("k_len")], dims)
        tiles = with_keys(choose_attention_schedule(launch.kernel, _queries(launch, dims)), keys)
        return attention_job(launch.kernel, target, tiles, *_alignment(launch, dims), name=name)
    if isinstance(launch, ir.ProductLaunch):
        cut = choose_product_schedule(launch.kernel, _queries(launch, dims))
        return product_job(launch.kernel, target, cut, *_alignment(launch, dims), name=name)
    return None


def _queries(launch: ir.Launch, dims: Mapping[str, int]) -> int:
    return evaluate(launch.sizes[NAMES.index("q_len")], dims)


def _alignment(
    launch: ir.Launch, dims: Mapping[str, int]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the strides that are multiples of 16, and the pointers that are not."""
    flash = isinstance(launch, ir.AttentionLaunch)
    names, strides = (NAMES, STRIDES) if flash else (PRODUCT_NAMES, PRODUCT_STRIDES)
    of_flash = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "keys_ptr", "bias_ptr")
    values = {n: evaluate(e, dims) for n, e in zip(names, launch.sizes, strict=True)}
    pointers = zip(
        of_flash if flash else ("a_ptr", "b_ptr", "out_ptr"), launch.operands, strict=True
    )
    odd = [
        pointer
        for pointer, a in pointers
        if a is not None and evaluate(a.offset * a.dtype.itemsize, dims) % ALIGNED_NBYTES
    ]
    return tuple(n for n in strides if values[n] % 16 == 0), tuple(odd)
