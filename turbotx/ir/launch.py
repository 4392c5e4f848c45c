"""Launches: the steps of a program over named tensors, one type per kind of step.

In: nothing; these types are shared by the stages after the kernels. Out, for example::

    GemmLaunch(GemmKernel("gelu"), x, weight, bias, out, rows=batch*seq, ..., name="linear_gelu_0")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.utils._pytree as pytree
from sympy import Integer
from torch import fx

from turbotx.ir.expr import Expr, dim, product
from turbotx.ir.kernel import Kernel
from turbotx.ir.matmul_kernels import (
    ACTIVATIONS,
    DTYPE_CODES,
    AttentionKernel,
    GemmKernel,
    ProductKernel,
    SequenceKernel,
)


@dataclass(frozen=True)
class Tensor:
    """A named tensor of a program.

    kind: who owns its memory: "input" and "parameter" the caller, "hoisted" the program (computed
    from parameters), "output" the caller once returned, "intermediate" the memory plan.
    """

    name: str
    kind: str
    dtype: torch.dtype
    shape: tuple[Expr, ...]

    @property
    def nbytes(self) -> Expr:
        """Bytes of the tensor, as an expression over the captured dims."""
        return product(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Operand:
    """A strided window on a tensor of the program: strides and offset in elements."""

    tensor: str
    dtype: torch.dtype
    shape: tuple[Expr, ...]
    strides: tuple[Expr, ...]
    offset: Expr


@dataclass(frozen=True)
class AtenCall:
    """A call that PyTorch runs.

    target: an op, or a graph of ops that returns a tuple.
    args, kwargs: nested; an `Operand` for each tensor, an expression for each size.
    writes: where its results go, None for an unused one.
    has_out: the op's `out` overload writes the first result.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    writes: tuple[Operand | None, ...]
    has_out: bool = False


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One step of a program.

    source: the calls that it computes.
    module: their place in the user's model.
    inplace: pairs (written tensor, read tensor) that may share memory.
    workspaces: tensors that only this launch uses.
    """

    kind: ClassVar[str]
    """Its name in reports."""

    name: str
    source: str = ""
    module: str = ""
    inplace: tuple[tuple[str, str], ...] = ()
    workspaces: tuple[str, ...] = ()

    @property
    def operands(self) -> tuple[Operand | None, ...]:
        """In the order of the native function's parameters; None for an absent optional one."""
        raise NotImplementedError

    @property
    def sizes(self) -> tuple[Expr, ...]:
        """In the order of the native function's parameters."""
        return ()

    @property
    def writes(self) -> tuple[str, ...]:
        """The tensors that it writes."""
        raise NotImplementedError

    @property
    def reads(self) -> tuple[str, ...]:
        """The tensors that it reads and does not write, without duplicates."""
        names = (a.tensor for a in self.operands if a is not None)
        return tuple(dict.fromkeys(n for n in names if n not in self.writes))


@dataclass(frozen=True)
class KernelLaunch(Launch):
    """A generated kernel.

    args, nodes: the operand and the graph node of each param; the PyTorch call follows from nodes.
    """

    kind = "kernel"

    kernel: Kernel
    args: tuple[Operand, ...]
    nodes: tuple[fx.Node, ...]

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The kernel's arguments, in the order of its params."""
        return self.args

    @property
    def sizes(self) -> tuple[Expr, ...]:
        """The dims that the kernel takes as integer arguments."""
        return tuple(dim(name) for name in self.kernel.sizes)

    @property
    def writes(self) -> tuple[str, ...]:
        """The tensors of the params with role "out"."""
        return tuple(
            a.tensor for a, p in zip(self.args, self.kernel.params, strict=True) if p.role == "out"
        )


@dataclass(frozen=True)
class NormOperands:
    """Further operands of a GEMM with folded norms, all float32.

    sums, scales: of the weight's rows. x_stats, residual_stats: of the rows that it normalises.
    residual_affine: gamma and beta for the residual.
    stats: where statistics of its own rows are stored.
    """

    sums: Operand | None = None
    scales: Operand | None = None
    x_stats: Operand | None = None
    residual_affine: Operand | None = None
    residual_stats: Operand | None = None
    stats: Operand | None = None


@dataclass(frozen=True)
class Int8Operands:
    """Further operands of a GEMM with int8 or int4 weights, float32.

    weight_scale: of the weight's rows, (n,); of int4 (n, groups, ..), one for `group` inputs.
    x_scale: of x's rows, (.., 1); None if x is int8 with scale 1, or floating point, and then
    float_rows says whether its rows are multiplied directly or quantised first.
    x_peaks: largest magnitudes of x's rows by part, int32 (rows, room for parts), to quantise by.
    peaks: where the largest magnitudes of the output's rows are stored.
    """

    weight_scale: Operand
    x_scale: Operand | None = None
    float_rows: bool = False
    group: int = 0
    x_peaks: Operand | None = None
    peaks: Operand | None = None


@dataclass(frozen=True)
class GemmLaunch(Launch):
    """out = epilogue(x weight^T).

    x: (rows, k) with a row stride of `x_stride` elements; weight: (n, k).
    call: the equivalent PyTorch call.
    norm, int8: set if norms are folded into it, or if its weight is quantised.
    fallback: equivalent launches that a runtime may run instead at some shapes.
    """

    kind = "gemm"

    gemm: GemmKernel
    x: Operand
    weight: Operand
    bias: Operand | None
    out: Operand
    residual: Operand | None
    rows: Expr
    x_stride: Expr
    call: AtenCall
    norm: NormOperands | None = None
    fallback: GemmFallback | None = None
    int8: Int8Operands | None = None

    @property
    def width(self) -> Expr:
        """Number of columns stored."""
        return self.out.shape[-1]

    @property
    def operands(self) -> tuple[Operand | None, ...]:
        """x, weight, bias, out, residual, int8 scales or operands of folded norms; some None."""
        own, n, q = (self.x, self.weight, self.bias, self.out, self.residual), self.norm, self.int8
        if q is not None:
            scales = q.weight_scale, q.x_scale or q.x_peaks
            return (*own, *scales) if q.peaks is None else (*own, *scales, q.peaks)
        if n is None:
            return own
        read = (n.sums, n.scales, n.x_stats, n.residual_affine, n.residual_stats)
        return *own, *read, n.stats

    @property
    def sizes(self) -> tuple[Expr, ...]:
        """Rows, stride of x, width and row length of the output, the activation's index; for int8
        also the code of the output's dtype, and 1 for floating-point rows, 2 for scale 1."""
        activation = Integer(ACTIVATIONS.index(self.gemm.activation))
        own = self.rows, self.x_stride, self.width, self.width, activation
        if self.int8 is None:
            return own
        whole = self.int8.x_scale is None and self.x.dtype is torch.int8
        rows = 2 if whole else int(self.int8.float_rows)
        return *own, Integer(DTYPE_CODES[self.out.dtype]), Integer(rows)

    @property
    def writes(self) -> tuple[str, ...]:
        """The output, and the row statistics if stored."""
        left = None if self.norm is None else self.norm.stats
        left = left if self.int8 is None else self.int8.peaks
        return (self.out.tensor,) if left is None else (self.out.tensor, left.tensor)


@dataclass(frozen=True)
class GemmFallback:
    """A bare GEMM and the kernels after it, over the tensors and workspaces of one launch."""

    gemm: GemmLaunch
    ends: tuple[KernelLaunch, ...]


class ExtentsLaunch(Launch):
    """A launch with an explicit list of size arguments, `extents`."""

    extents: tuple[Expr, ...]

    @property
    def sizes(self) -> tuple[Expr, ...]:
        """The kernel's integer arguments."""
        return self.extents


@dataclass(frozen=True)
class AttentionLaunch(ExtentsLaunch):
    """out = softmax(scale q k^T + bias) v.

    q, k, v: (batch, heads, rows, head_dim); out: (batch, q_len, heads, head_dim).
    keys: a key mask or lengths; sinks: float32 (heads,). call: the equivalent PyTorch call.
    sequences: bounds and starts, if packed (`ir.packed_ops`). blocks: if keys or values are in a
    cache: its memory, and its block table's rows for both. peaks: where the largest magnitudes of
    the output's rows are stored, int32 (rows, heads).
    """

    kind = "attention"

    kernel: AttentionKernel
    q: Operand
    k: Operand
    v: Operand
    out: Operand
    keys: Operand | None
    bias: Operand | None
    sinks: Operand | None
    extents: tuple[Expr, ...]
    """Sizes and strides, in the order of `kernels.cpp.attention.SIZES`."""
    call: AtenCall
    sequences: tuple[Operand, ...] = ()
    blocks: tuple[Operand | None, ...] = ()
    peaks: Operand | None = None

    @property
    def operands(self) -> tuple[Operand | None, ...]:
        """q, k, v, out, keys, bias and sinks, None for absent ones; then bounds and starts if
        packed, or a cache's memory and the table rows of keys and of values; then peaks."""
        own = self.q, self.k, self.v, self.out, self.keys, self.bias, self.sinks
        return *own, *self.sequences, *self.blocks, *([] if self.peaks is None else [self.peaks])

    @property
    def writes(self) -> tuple[str, ...]:
        """The names of the output, and if stored of its rows' magnitudes and of the cache."""
        stored = (self.peaks, self.blocks[0] if self.kernel.stores else None)
        return (self.out.tensor, *(x.tensor for x in stored if x is not None))


@dataclass(frozen=True)
class ProductLaunch(ExtentsLaunch):
    """One of attention's two products: scores = a b^T, or out = a b.

    call: the equivalent PyTorch call.
    """

    kind = "product"

    kernel: ProductKernel
    a: Operand
    b: Operand
    out: Operand
    extents: tuple[Expr, ...]
    """Sizes and strides, in the order of `kernels.cpp.products.SIZES`."""
    call: AtenCall

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The two factors and the output."""
        return self.a, self.b, self.out

    @property
    def writes(self) -> tuple[str, ...]:
        """The name of the output."""
        return (self.out.tensor,)


@dataclass(frozen=True)
class StoreLaunch(ExtentsLaunch):
    """Stores new rows of a decoder's layer in its cache, an input that is updated in place.

    held: all of the layer's rows after the call, (batch, heads, length, width). new: the last of
    them. call: the equivalent PyTorch call. blocks: as of `AttentionLaunch`, with one table row.
    """

    kind = "store"

    held: Operand
    new: Operand
    extents: tuple[Expr, ...]
    """Sizes and strides, see `program.cache_stores`."""
    call: AtenCall
    blocks: tuple[Operand, ...] = ()

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The cache's tensor, which is updated in place, the new rows, and the block operands."""
        return self.held, self.new, *self.blocks

    @property
    def writes(self) -> tuple[str, ...]:
        """The name of the cache's tensor."""
        return (self.held.tensor,)


@dataclass(frozen=True)
class AtenLaunch(Launch):
    """A call that PyTorch runs."""

    kind = "aten"

    call: AtenCall

    @property
    def operands(self) -> tuple[Operand | None, ...]:
        """The tensors among the call's arguments, then its outputs, None for unused ones."""
        leaves = pytree.tree_leaves((self.call.args, dict(self.call.kwargs)))
        return *(x for x in leaves if isinstance(x, Operand)), *self.call.writes

    @property
    def writes(self) -> tuple[str, ...]:
        """The outputs that are used."""
        return tuple(w.tensor for w in self.call.writes if w is not None)


@dataclass(frozen=True)
class SequenceLaunch(AtenLaunch):
    """An op on the tokens of each sequence: of x and bounds, both dense; PyTorch runs it on a CPU.

    extents: sequences, then x's size before, of and after the token dim.
    """

    kernel: SequenceKernel
    extents: tuple[Expr, ...]

    @property
    def sizes(self) -> tuple[Expr, ...]:
        """The integer arguments of its kernel."""
        return self.extents[1:]
