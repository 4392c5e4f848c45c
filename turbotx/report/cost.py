"""Cost: the bytes that a launch has to move and its operations, as formulas in the dims.

In: an `ir.Launch`. Out: its `Cost`. Each element that a launch needs is counted once, however the
kernel reads it; a gather counts the elements it reads, at most the whole table. For a bias and
GELU::

    Cost(reads=6144*batch*seq + 6144, writes=6144*batch*seq, flops=39936*batch*seq)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sympy
from torch.utils._sympy.functions import FloorDiv

from turbotx import ir
from turbotx.ir.expr import ONE, ZERO, Expr, product
from turbotx.ir.primitives import PRIMITIVES
from turbotx.kernels.fusion.traffic import kernel_traffic
from turbotx.report.origin import Origin

PICKING = frozenset({"embedding", "index", "index_select", "gather", "take", "take_along_dim"})
"""Ops that read only selected elements."""


@dataclass(frozen=True)
class Cost:
    """Bytes read, bytes written and operations of one launch.

    flops: a multiply-add of a GEMM or of attention counts as two; the ops of a fused kernel count
    by the `cost` of their primitives, in units of one add.
    """

    reads: Expr
    writes: Expr
    flops: Expr


def launch_cost(launch: ir.Launch) -> Cost:
    """Return what one launch has to move and compute."""
    if isinstance(launch, ir.KernelLaunch):
        traffic = kernel_traffic(launch.kernel)
        return Cost(traffic.read_nbytes, traffic.written_nbytes, _arithmetic(launch.kernel))
    if isinstance(launch, ir.StoreLaunch):  # only the new rows of a cache
        moved = _operand_nbytes(launch.new)
        return Cost(moved, moved, ZERO)
    windows = {a.tensor: _operand_nbytes(a) for a in launch.operands if a}
    written = {name: n for name, n in windows.items() if name in launch.writes}
    read = {name: n for name, n in windows.items() if name not in launch.writes}
    if isinstance(launch, (ir.AttentionLaunch, ir.ProductLaunch)):
        read = _add_windows(launch)
    if isinstance(launch, ir.AttentionLaunch) and launch.kernel.stores:
        batch, _, kv_heads, q_len, k_len = launch.sizes[:5]
        row = 2 * batch * kv_heads * launch.kernel.head_dim * launch.k.dtype.itemsize
        read[launch.writes[1]], written[launch.writes[1]] = row * (k_len - q_len), row * q_len
    if isinstance(launch, ir.GroupedGemmLaunch):  # a row needs one expert's weight
        experts, *matrix = launch.weight.shape
        used = product(matrix) * launch.weight.dtype.itemsize
        read[launch.weight.tensor] = _least(experts, launch.rows) * used
    return Cost(_total(read.values()), _total(written.values()), _flops(launch))


def _arithmetic(kernel: ir.Kernel) -> Expr:
    """Count every value once per position that it varies over; casts are free."""
    varies, extents = kernel.varies_over(), {a.name: a.extent for a in kernel.axes}
    counts: dict[frozenset[str], int] = {}
    for s in kernel.body:
        if isinstance(s, ir.Compute) and s.op != "cast":
            axes, cost = varies[s.result], PRIMITIVES[s.op].cost
        elif isinstance(s, ir.Reduce):
            axes = frozenset().union(*(varies[a] for a in s.args))
            cost = len(s.results)
        else:
            continue
        counts[axes] = counts.get(axes, 0) + cost
    return _total(n * product([extents[a] for a in sorted(axes)]) for axes, n in counts.items())


def eager_nbytes(origin: Origin) -> dict[str, Expr]:
    """Return what each op of the captured model moves when PyTorch runs it on its own.

    An op reads each input and writes its result; of a table it reads at most as much as it writes.
    Views and no-ops in inference are omitted.
    """
    node = {n.name: n for n in origin.nodes}
    found = {}
    for n in origin.nodes:
        if not n.makes_memory:
            continue
        inputs = [_least(node[i].nbytes, node[node[i].root].nbytes) for i in n.inputs]
        if n.op in PICKING:
            inputs = [_least(size, n.nbytes) for size in inputs]
        found[n.name] = sympy.expand(n.nbytes + sum(inputs, ZERO))
    return found


def _least(a: Expr, b: Expr) -> Expr:
    return a if a == b else sympy.Min(a, b)


def _operand_nbytes(operand: ir.Operand) -> Expr:
    """Return the bytes that a window covers, an axis of stride 0 counted once, and of two axes of
    opposite strides each diagonal."""
    extents: list[Expr] = []
    steps: list[Expr] = []
    for extent, stride in zip(operand.shape, operand.strides, strict=True):
        if stride != 0 and -stride in steps:
            extents[steps.index(-stride)] += extent - 1
        elif stride != 0:
            extents, steps = [*extents, extent], [*steps, stride]
    return product(extents) * operand.dtype.itemsize


def _add_windows(launch: ir.Launch) -> dict[str, Expr]:
    """Q, K and V are often three windows on one packed tensor: all of them count."""
    found: dict[str, Expr] = {}
    blocks = launch.blocks if isinstance(launch, ir.AttentionLaunch) else ()
    for arg in launch.operands:
        if arg is not None and arg.tensor not in launch.writes and arg not in blocks:
            found[arg.tensor] = found.get(arg.tensor, ZERO) + _operand_nbytes(arg)
    return found


def _flops(launch: ir.Launch) -> Expr:
    if isinstance(launch, (ir.GemmLaunch, ir.GroupedGemmLaunch)):
        return 2 * launch.rows * product(launch.weight.shape[-2:])
    if isinstance(launch, (ir.AttentionLaunch, ir.ProductLaunch)):
        batch, heads, _, q_len, k_len = launch.sizes[:5]
        if isinstance(launch, ir.AttentionLaunch) and launch.kernel.packed:
            q_len, k_len = ONE, FloorDiv(q_len * k_len, batch * batch)  # for equal lengths
        products = 2 if isinstance(launch, ir.AttentionLaunch) else 1
        return 2 * products * batch * heads * q_len * k_len * launch.kernel.head_dim
    return ZERO


def _total(values: Iterable[Expr]) -> Expr:
    return sympy.expand(sum(values, ZERO))
