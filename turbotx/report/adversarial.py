"""Adversarial: tests every kernel against float64 on numerically difficult inputs.

In: a compiled call and its tensors. Out: the errors of every generated kernel beside eager's own,
on inputs with a large mean, rows of minus infinity, or denormals::

    stress(compiled, tensors, names, dims)["large mean"][3].holds
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from turbotx import ir
from turbotx.engine.compiled import Compiled
from turbotx.report.numerics import Error, LaunchErrors
from turbotx.report.replay import dims_of, make_reader, make_viewer
from turbotx.runtime.state import RunState

GENERATED = (ir.KernelLaunch, ir.AttentionLaunch)


def _large_mean(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator) + 1e4


def _hidden_rows(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return values with every third row all minus infinity, and every second element of the next
    row."""
    values = torch.randn(shape, generator=generator)
    if values.dim() and values.numel():
        rows = values.reshape(-1, shape[-1])
        rows[::3] = float("-inf")
        rows[1::3, ::2] = float("-inf")
    return values


def _denormals(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator) * 1e-39


CASES: Mapping[str, Callable[[torch.Size, torch.Generator], torch.Tensor]] = {
    "large mean": _large_mean,
    "-inf rows": _hidden_rows,
    "denormals": _denormals,
}


def stress(
    compiled: Compiled, tensors: Sequence[torch.Tensor],
    names: Callable[[ir.Launch], str], dims: Mapping[str, int],
) -> dict[str, tuple[Error, ...]]:  # fmt: skip
    """Return, by case, the error of every generated kernel; not thread-safe for `compiled`.

    Attention gets the denormals as q, k and v, and the minus infinities in its bias: scores of 1e8
    would measure how products are rounded, which concerns GEMMs, in eager as in turbotx. tensors:
    the call's inputs, for their shapes and integer values.
    """
    sizes = dims_of(compiled, tensors)
    found = {}
    for case in CASES:
        watch = _Harsh(case, compiled, names, dims)
        program = compiled.program
        copies = [t.clone() for t in tensors]  # the caller's inputs must not be changed
        with torch.no_grad():
            program.run(program.bind(sizes), copies, watch=watch)
        found[case] = watch.errors.found
    return found


class _Harsh:
    """Overwrites the inputs of a kernel before it runs, then checks its results."""

    def __init__(
        self, case: str, compiled: Compiled,
        names: Callable[[ir.Launch], str], dims: Mapping[str, int],
    ) -> None:  # fmt: skip
        self._case, self._dims = case, compiled.captured.dims
        self._launches, self._tensors = compiled.assembly.launches, compiled.assembly.tensors
        self.errors = LaunchErrors(compiled, names, dims)

    def before(self, launch: int, state: RunState) -> None:
        if not isinstance(self._launches[launch], GENERATED):
            return
        view = make_viewer(state, self._dims)
        generator = torch.Generator().manual_seed(launch)
        for operand in self._replaced(self._launches[launch]):
            tensor = view(operand)
            if all(s > 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
                tensor.copy_(CASES[self._case](tensor.shape, generator))
        self.errors.before(launch, make_reader(state, self._dims))

    def after(self, launch: int, state: RunState) -> None:
        if isinstance(self._launches[launch], GENERATED):
            self.errors.after(launch, make_reader(state, self._dims))

    def _replaced(self, launch: ir.Launch) -> list[ir.Operand]:
        reads = [a for a in launch.operands if a is not None and a.tensor in launch.reads]
        if isinstance(launch, ir.AttentionLaunch):
            given = (launch.q, launch.k, launch.v)
            chosen = {"denormals": given, "-inf rows": (launch.bias,)}
            reads = [a for a in chosen.get(self._case, ()) if a is not None]
        return [
            a
            for a in reads
            if a.dtype.is_floating_point
            and self._tensors[a.tensor].kind in ("input", "intermediate")
        ]
