"""Print attention's two matrix products as Triton: batched GEMMs over strided operands.

In: a `ProductKernel`. Out: stand-alone source of one function over the operands of the C++ launch,
then the sizes of `cpp_products.SIZES`, dots written as underscores. One program a tile of out::

    scores: out = a b^T in float32, b (k_len, head_dim)    values: out = a b, b (k_len, head_dim)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turbotx.ir.matmul_kernels import ProductKernel
from turbotx.kernels.cpp.products import SIZES
from turbotx.kernels.schedule import power_above
from turbotx.kernels.triton.attention import FEW_QUERIES
from turbotx.kernels.triton.functions import stand_alone
from turbotx.kernels.triton.reduce import TYPES
from turbotx.kernels.triton.specialize import Flag, specialize

PRODUCT_NAMES = tuple(name.replace(".", "_") for name in SIZES)
# With k_len, which bounds the columns of scores: a multiple of 16 where their stride is one.
PRODUCT_STRIDES = tuple(n for n in PRODUCT_NAMES if n.split("_")[0] in ("a", "b", "out")) + (
    "k_len",
)


@dataclass(frozen=True)
class ProductSchedule:
    """A tile of m x n of the result, k of the summed length at a time."""

    m_tile: int
    n_tile: int
    k_tile: int
    num_warps: int = 4
    num_stages: int = 2


def choose_product_schedule(kernel: ProductKernel, q_len: int | None = None) -> ProductSchedule:
    """Return one of two schedules for a kernel: for few queries, and for many."""
    m_tile = 16 if q_len is not None and q_len <= FEW_QUERIES else 64
    width = max(16, min(64, power_above(kernel.head_dim)))
    if kernel.dtype is torch.float32:  # multiplied on the ordinary units: less in flight
        m_tile = min(m_tile, 32)
        n_tile = 32 if kernel.which == "scores" else min(width, 32)
        # Four elements of b a thread at least, which is one access of 128 bits.
        k_tile = max(16, width // 2) if kernel.which == "scores" else 512 // n_tile
        return ProductSchedule(m_tile, n_tile, k_tile, 4, 1)
    return ProductSchedule(m_tile, *((64, width) if kernel.which == "scores" else (width, 64)))


def packed_strides(kernel: ProductKernel) -> tuple[str, ...]:
    """Return the sizes that are multiples of 16 where q, k and v are pieces of packed vectors."""
    vectors = ("a", "b") if kernel.which == "scores" else ("b", "out")
    return tuple(
        n for n in PRODUCT_STRIDES if kernel.head_dim % 16 == 0 and n.split("_")[0] in vectors
    )


def print_triton_product(
    kernel: ProductKernel, schedule: ProductSchedule | None = None, name: str | None = None
) -> str:
    """Return the Triton source of a product launch."""
    schedule = schedule or choose_product_schedule(kernel)
    scores = kernel.which == "scores"
    flags: dict[str, Flag] = {
        "SCORES": scores,
        "HEAD_DIM": kernel.head_dim,
        "STORED": "tl.float32" if scores else TYPES[kernel.dtype],
        "PRECISION": "ieee" if kernel.dtype is torch.float32 else None,
    }
    name = name or kernel.name
    arguments = ["a_ptr", "b_ptr", "out_ptr", *PRODUCT_NAMES, "M_TILE", "N_TILE", "K_TILE"]
    header = [
        name,
        f"  out = {'a b^T in float32' if scores else 'a b'} for every head, head_dim"
        f" {kernel.head_dim}",
        f"  tiles of {schedule.m_tile} x {schedule.n_tile}, {schedule.k_tile} at a time,"
        f" {schedule.num_warps} warps",
    ]
    return stand_alone(header, specialize("products", "product", name, arguments, flags))


def product_grid(
    kernel: ProductKernel, schedule: ProductSchedule, batch: int, heads: int, q_len: int, k_len: int
) -> tuple[int, int, int]:
    """Return the number of programs: one a tile of out, tiles of one head side by side."""
    width = k_len if kernel.which == "scores" else kernel.head_dim
    tiles = -(-q_len // schedule.m_tile) * -(-width // schedule.n_tile)
    return tiles * batch * heads, 1, 1
