"""Launches: what a program runs, over named tensors.

In: nothing; these are the types that the stages after the kernels share. Out: for example::

    Launch("linear_0", "gemm", GemmKernel(...), (x, weight, bias, out), writes=("linear_0",))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turbotx.ir.expr import Expr, product


@dataclass(frozen=True)
class Tensor:
    """A named tensor of a program. `kind` says who owns its memory: "input" and "parameter" the
    caller, "prepared" the program (made from parameters), "output" the caller from then on,
    "intermediate" the plan."""

    name: str
    kind: str
    dtype: torch.dtype
    shape: tuple[Expr, ...]

    @property
    def nbytes(self) -> Expr:
        return product(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Operand:
    """A strided window on a program's tensor: strides and offset in elements."""

    tensor: str
    dtype: torch.dtype
    shape: tuple[Expr, ...]
    strides: tuple[Expr, ...]
    offset: Expr


@dataclass(frozen=True)
class Launch:
    """One step of a program.

    kind: "kernel" (target: Kernel), "gemm" (target: GemmKernel; args: x, weight, bias, out,
    residual), "attention" (target: AttentionKernel), "product" (target: ProductKernel), "store"
    (args: a cache's memory, an input that is written all the same, and rows) or "aten" (target: the
    op, with its arguments in `call`). args are in the order of the target, None where an optional
    one is absent; sizes likewise.
    call is what PyTorch runs in its place: (op, args, kwargs, written operands, whether the op
    writes into them itself), or for kernels the `Lowered` they came from.
    source: the calls that it computes; module: where they stand in the user's model. inplace: pairs
    (written tensor, read tensor) that may be the same bytes. workspaces: tensors that only this
    launch touches. instead: launches that do the same one after another, over the same tensors and
    workspaces; a runtime may take them at some shapes.
    """

    name: str
    kind: str
    target: object
    args: tuple[Operand | None, ...]
    writes: tuple[str, ...]
    sizes: tuple[Expr, ...] = ()
    call: tuple[object, ...] = ()
    source: str = ""
    module: str = ""
    inplace: tuple[tuple[str, str], ...] = ()
    workspaces: tuple[str, ...] = ()
    instead: tuple[Launch, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        names = (a.tensor for a in self.args if a is not None)
        return tuple(dict.fromkeys(n for n in names if n not in self.writes))
