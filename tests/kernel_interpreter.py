"""Executes an `ir.Kernel` on tensors by the meanings of its primitives: what a printer must match.

In: a kernel, one tensor per param and the dims. Out: the tensors it stores, in float64 by default,
so that they are as near to the function's true value as torch's own float64; for example::

    interpret(kernel, {"x": x}, {"batch": 2, "seq": 17})  ->  {"softmax": tensor}

It also checks what a machine would not: that loads lie inside their tensors and that every output
is stored, with one value at each place.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from turbotx import ir
from turbotx.ir.expr import Expr, evaluate
from turbotx.ir.primitives import PRIMITIVES, REDUCTIONS, SCANS


class CheckFailed(Exception):
    """An `ir.Check` of the kernel did not hold."""


def interpret(
    kernel: ir.Kernel,
    inputs: Mapping[str, torch.Tensor],
    dims: Mapping[str, int],
    precise: bool = True,
) -> dict[str, torch.Tensor]:
    """Return the outputs by param name; floats are float64 throughout where `precise`."""
    return _Interpreter(kernel, inputs, dims, precise).run()


class _Interpreter:
    def __init__(
        self, kernel: ir.Kernel, inputs: Mapping[str, torch.Tensor], dims: Mapping[str, int],
        precise: bool,
    ) -> None:  # fmt: skip
        self.kernel, self.dims, self.precise = kernel, dims, precise
        self.extents = [evaluate(a.extent, dims) for a in kernel.axes]
        self.columns = [k for k, a in enumerate(kernel.axes) if a.kind == ir.REDUCTION]
        self.values: dict[str, torch.Tensor] = {}
        self.flat: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        self.times: dict[str, torch.Tensor] = {}
        for p in kernel.params:
            shape = [evaluate(e, dims) for e in p.shape]
            if p.role == "out":
                self.outputs[p.name] = torch.zeros(shape, dtype=self.dtype(p.dtype))
                self.times[p.name] = torch.zeros(self.outputs[p.name].numel(), dtype=torch.int64)
            else:
                self.flat[p.name] = _memory_of(inputs[p.name])

    def dtype(self, declared: torch.dtype) -> torch.dtype:
        return torch.float64 if self.precise and declared.is_floating_point else declared

    def run(self) -> dict[str, torch.Tensor]:
        for s in self.kernel.body:
            self._step(s)
        for name, times in self.times.items():
            assert bool((times > 0).all()), f"{name} is not stored everywhere"
        return self.outputs

    def place(self, value: Expr) -> torch.Tensor:
        """Return an index expression on the grid of all axes."""
        if isinstance(value, FloorDiv):
            return self.place(value.args[0]) // self._divisor(value.args[1])
        if isinstance(value, (Mod, PythonMod)):
            return self.place(value.args[0]) % self._divisor(value.args[1])
        if value.is_Integer:
            return torch.tensor(int(value))
        if value.is_Symbol:
            return self._symbol(value.name)
        parts = [self.place(a) for a in value.args]
        if value.is_Pow:
            return parts[0] ** parts[1]
        combine = {"Add": torch.add, "Mul": torch.mul, "Max": torch.maximum, "Min": torch.minimum}
        total = parts[0]
        for part in parts[1:]:
            total = combine[type(value).__name__](total, part)
        return total

    def _divisor(self, value: Expr) -> torch.Tensor:
        """Return a divisor: one for an empty dim, which has no places to compute."""
        return self.place(value).clamp(min=1)

    def _symbol(self, name: str) -> torch.Tensor:
        if name[0] == "%":
            return self.values[name[1:]].to(torch.int64)
        if name[0] != "@":
            return torch.tensor(self.dims[name])
        k = [a.name for a in self.kernel.axes].index(name[1:])
        shape = [1] * len(self.extents)
        shape[k] = self.extents[k]
        return torch.arange(self.extents[k]).reshape(shape)

    def _step(self, s: ir.Statement) -> None:
        values = self.values
        if isinstance(s, ir.Load):
            values[s.result] = self._load(s)
        elif isinstance(s, ir.Index):
            values[s.result] = self.place(s.value).to(s.dtype)
        elif isinstance(s, ir.Constant):
            values[s.result] = torch.tensor(s.value, dtype=self.dtype(s.dtype))
        elif isinstance(s, ir.Compute) and s.op == "cast":
            values[s.result] = values[s.args[0]].to(self.dtype(s.dtype))
        elif isinstance(s, ir.Compute):
            result = PRIMITIVES[s.op].meaning(*(values[a] for a in s.args))
            assert result.dtype == self.dtype(s.dtype), f"{s} gives {result.dtype}"
            values[s.result] = result
        elif isinstance(s, ir.Reduce):
            self._reduce(s)
        elif isinstance(s, ir.Scan):
            self._scan(s)
        elif isinstance(s, ir.Check):
            value, limit = values[s.value], self.place(s.limit)
            wrong = (value < 0) | (value >= limit)
            if s.mask:
                wrong = wrong & values[s.mask]
            if bool(self._spread(wrong).any()):
                raise CheckFailed(f"{s.value} lies outside [0, {s.limit})")
        else:
            self._store(s)

    def _spread(self, value: torch.Tensor) -> torch.Tensor:
        return value.expand(self.extents) if self.extents else value

    def _load(self, s: ir.Load) -> torch.Tensor:
        memory, at = self.flat[s.access.param], self.place(s.access.offset)
        inside = (at >= 0) & (at < memory.numel())
        mask = self.values[s.access.mask] if s.access.mask else torch.tensor(True)
        assert bool(self._spread(inside | ~mask).all()), f"{s} reads outside its tensor"
        if memory.numel() == 0:
            return torch.zeros(at.shape, dtype=self.dtype(s.dtype))
        found = memory[torch.where(inside, at, 0)].to(self.dtype(s.dtype))
        return torch.where(mask, found, torch.zeros_like(found))

    def _reduce(self, s: ir.Reduce) -> None:
        (argument,) = s.args
        kept = [k for k in range(len(self.extents)) if k not in self.columns]
        x = self._spread(self.values[argument]).permute(*kept, *self.columns)
        x = x.reshape([self.extents[k] for k in kept] + [-1]) if x.numel() else _emptied(x, kept)
        shape = [1 if k in self.columns else n for k, n in enumerate(self.extents)]
        if x.shape[-1] == 0 and s.op in ("max", "min", "softmax"):
            x = x.new_zeros((*x.shape[:-1], 1))  # of no columns: nothing depends on the result
        for name, result in zip(s.results, REDUCTIONS[s.op].meaning(x), strict=True):
            self.values[name] = result.reshape(shape).to(self.dtype(s.dtype))

    def _scan(self, s: ir.Scan) -> None:
        kept = [k for k in range(len(self.extents)) if k not in self.columns]
        order = [*kept, *self.columns]
        x = self._spread(self.values[s.args[0]]).permute(*order)
        rows = x.reshape([self.extents[k] for k in kept] + [-1]) if x.numel() else x
        result = SCANS[s.op].meaning(rows).to(self.dtype(s.dtype)).reshape(x.shape)
        self.values[s.result] = result.permute([order.index(k) for k in range(len(order))])

    def _store(self, s: ir.Store) -> None:
        target, times = self.outputs[s.access.param], self.times[s.access.param]
        at, value = self.place(s.access.offset), self.values[s.value]
        mask = self.values[s.access.mask] if s.access.mask else torch.tensor(True)
        at, value, mask = torch.broadcast_tensors(at, value, mask)
        at, value = at[mask], value[mask]
        assert bool(((at >= 0) & (at < target.numel())).all()), f"{s} writes outside its tensor"
        target.view(-1)[at.reshape(-1)] = value.reshape(-1).to(target.dtype)
        times.index_add_(0, at.reshape(-1), torch.ones_like(at.reshape(-1)))
        stored, wanted = target.view(-1)[at], value.to(target.dtype)
        agrees = (stored == wanted) | ((stored != stored) & (wanted != wanted))
        assert bool(agrees.all()), f"{s} stores different values at one place"


def _memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor's elements as they lie in memory, from its first one on."""
    if tensor.numel() == 0 or tensor.is_contiguous():
        return tensor.reshape(-1)
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((last + 1,), (1,))


def _emptied(x: torch.Tensor, kept: list[int]) -> torch.Tensor:
    sizes = list(x.shape[: len(kept)])
    length = 1
    for n in x.shape[len(kept) :]:
        length *= n
    return x.new_zeros((*sizes, length))
