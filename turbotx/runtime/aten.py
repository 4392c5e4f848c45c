"""Launches that PyTorch runs: ops without a kernel, and everything where there is no compiler.

In: a launch. Out: a function that runs it on tensors that lie in the plan, results written
there too, so that the launches around it need not know::

    cumsum  ->  step(state): window(out).copy_(aten.cumsum(window(x), 1))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import nn

from turbotx import ir
from turbotx.capture.eager import Alias
from turbotx.ir.expr import compile_evaluator
from turbotx.ir.strides import contiguous_strides
from turbotx.program.meaning import meaning_of
from turbotx.runtime.aten_call import call_into
from turbotx.runtime.state import Maker, RunState, Step, make_alias, make_window


class AtenSteps:
    """Makes steps for one program's launches."""

    def __init__(self, dims: Sequence[str]) -> None:
        self._dims = dims

    def make(self, launch: ir.Launch) -> Step:
        """Return a function that runs one launch by PyTorch."""
        call = meaning_of(launch)
        arguments = self._rebuild((call.args, dict(call.kwargs)))
        results = [None if w is None else self.tensor(w) for w in call.writes]
        # A graph's forward, since hooks that a user gave to every module are not for this one.
        target = call.target.forward if isinstance(call.target, nn.Module) else call.target

        def step(state: RunState) -> None:
            given, options = arguments(state)
            windows = [None if r is None else r(state) for r in results]
            call_into(target, given, options, windows, call.has_out)

        return step

    def alias(self, leaf: Alias) -> Callable[[RunState], torch.Tensor]:
        """Return a function that gives a leaf that is an input, a parameter or a view of one."""
        steps = [
            (op, self._rebuild(args), self._rebuild(kwargs)) for op, args, kwargs in leaf.steps
        ]
        return make_alias(leaf.root, steps)

    def _rebuild(self, structure: Any) -> Maker:
        """Return a function that rebuilds call arguments with tensors and sizes filled in."""
        if isinstance(structure, ir.Operand):
            return self.tensor(structure)
        if isinstance(structure, sympy.Basic):
            evaluate = compile_evaluator([structure], self._dims)
            return lambda state: evaluate(*state.dims)[0]
        if isinstance(structure, (list, tuple)):
            parts = [self._rebuild(v) for v in structure]
            return lambda state: [part(state) for part in parts]
        if isinstance(structure, dict):
            named = {k: self._rebuild(v) for k, v in structure.items()}
            return lambda state: {k: v(state) for k, v in named.items()}
        return lambda state: structure

    def tensor(self, operand: ir.Operand) -> Callable[[RunState], torch.Tensor]:
        """Return a function that gives the tensor an operand stands for in one run."""
        return window_of(operand, self._dims)


def window_of(operand: ir.Operand, dims: Sequence[str]) -> Callable[[RunState], torch.Tensor]:
    """Return a function that gives an operand's own memory in one run, as a tensor."""
    shape = compile_evaluator(operand.shape, dims)
    strides = compile_evaluator(operand.strides, dims)
    offset = compile_evaluator([operand.offset], dims)
    return make_window(operand.tensor, operand.dtype, shape, strides, offset)


def is_whole(operand: ir.Operand, tensor: ir.Tensor) -> bool:
    """Tell whether an operand is just its tensor."""
    dense = operand.offset == 0 and operand.strides == contiguous_strides(operand.shape)
    return dense and operand.shape == tensor.shape
