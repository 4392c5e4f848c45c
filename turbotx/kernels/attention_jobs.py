"""Jobs that compile attention launches for a GPU target (`compiler.kernel_job` is for kernels).

In: an `AttentionKernel` or a `ProductKernel`, a target, tiles, known divisibility of strides and
addresses. Out: a `Job`: source, signature, tiles, and the arguments that are multiples of 16::

    attention_job(kernel, "sm_90", choose_attention_schedule(kernel, q_len))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from turbotx.ir.matmul_kernels import AttentionKernel, ProductKernel
from turbotx.kernels.job import Job
from turbotx.kernels.triton.attention import (
    CACHE_POINTERS,
    STRIDES,
    AttentionSchedule,
    attention_pointers,
    choose_attention_schedule,
    in_blocks,
    print_triton_attention,
    size_names,
)
from turbotx.kernels.triton.compiler import POINTEES, fit_warps
from turbotx.kernels.triton.products import (
    PRODUCT_NAMES,
    ProductSchedule,
    choose_product_schedule,
    packed_strides,
    print_triton_product,
)


def attention_job(
    kernel: AttentionKernel,
    target: str,
    schedule: AttentionSchedule | None = None,
    divisible: Iterable[str] = STRIDES,
    unaligned: Iterable[str] = (),
    cells: tuple[str, ...] = (),
) -> Job:
    """Return the job for an attention launch.

    divisible: strides that are multiples of 16, by default those of packed layouts. unaligned:
    pointers that are not multiples of 16 bytes. cells: arguments read from device memory.
    """
    schedule = schedule or choose_attention_schedule(kernel)
    schedule = in_blocks(schedule) if kernel.cached else schedule
    pointers, names = attention_pointers(kernel), size_names(kernel)
    tiles = (("Q_TILE", schedule.q_tile), ("K_TILE", schedule.k_tile))
    source = print_triton_attention(kernel, schedule)
    assumed = assume(pointers, unaligned, names, divisible)
    return sized_job(kernel.name, source, target, schedule, pointers, names, tiles, assumed, cells)


def product_job(
    kernel: ProductKernel,
    target: str,
    schedule: ProductSchedule | None = None,
    divisible: Iterable[str] | None = None,
    unaligned: Iterable[str] = (),
) -> Job:
    """Return the job for one of attention's two products, as `attention_job`.

    By default the strides of q, k, v and out are divisible where packed layouts make them so.
    """
    schedule = schedule or choose_product_schedule(kernel)
    stored = f"*{POINTEES[kernel.dtype]}"
    out = "*fp32" if kernel.which == "scores" else stored
    pointers = [("a_ptr", stored), ("b_ptr", stored), ("out_ptr", out)]
    known = packed_strides(kernel) if divisible is None else divisible
    tiles = (("M_TILE", schedule.m_tile), ("N_TILE", schedule.n_tile), ("K_TILE", schedule.k_tile))
    source, names = print_triton_product(kernel, schedule), PRODUCT_NAMES
    assumed = assume(pointers, unaligned, names, known)
    return sized_job(kernel.name, source, target, schedule, pointers, names, tiles, assumed)


class Warps(Protocol):
    """The part that all schedules have in common."""

    @property
    def num_warps(self) -> int:
        """Warps of a program."""

    @property
    def num_stages(self) -> int:
        """Software pipeline stages of loops."""


def sized_job(
    name: str, source: str, target: str, schedule: Warps, pointers: Sequence[tuple[str, str]],
    sizes: Sequence[str], tiles: tuple[tuple[str, int], ...], assumed: tuple[str, ...],
    cells: tuple[str, ...] = (),
) -> Job:  # fmt: skip
    """Return a job whose arguments are pointers, then sizes, then tiles."""
    return Job(
        name=name,
        source=source,
        target=target,
        signature=(
            *pointers, *((size, "i32") for size in sizes), *((t, "constexpr") for t, _ in tiles),
        ),
        constexprs=tiles,
        divisible=assumed,
        num_warps=fit_warps(schedule.num_warps, target),
        num_stages=schedule.num_stages,
        cells=cells,
    )  # fmt: skip


def assume(
    pointers: Iterable[tuple[str, str]], unaligned: Iterable[str],
    sizes: Iterable[str], divisible: Iterable[str],
) -> tuple[str, ...]:  # fmt: skip
    """Return the arguments that are multiples of 16: addresses in bytes, and sizes.

    Block tables are left out: their rows may start anywhere."""
    odd, even = {*unaligned, *CACHE_POINTERS[1:]}, set(divisible)
    return (*(p for p, _ in pointers if p not in odd), *(n for n in sizes if n in even))
