"""A model captured once, and bound to the device in many ways without another trace.

In: a model's name, a dtype, options. Out: calls of the model's one graph under other options, tiles
among them, each a program of its own over the same memory::

    session = Session("bert-base", "fp16")
    run = session.bind((1, 40), folded=True, pdl=True)     # a Bound: run.call(), run.replay()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu_models import DTYPES, make_inputs, make_model

import turbotx
from turbotx.engine.optimize import engine_of
from turbotx.options import make_options
from turbotx.runtime.binding import Binding
from turbotx.runtime.cuda.cuda_graphs import CudaGraphProgram


@dataclass(frozen=True)
class Bound:
    """A program at one shape. launches: what a call queues, PyTorch's part included."""

    program: CudaGraphProgram
    binding: Binding
    tensors: list[torch.Tensor]

    @torch.no_grad()
    def call(self) -> Any:
        """One call, inputs copied in and outputs copied out."""
        return self.program.run(self.binding, self.tensors)

    def replay(self) -> Callable[[], None]:
        """Capture the call, where that has not happened, and return its graph's bare replay."""
        for _ in range(2):
            self.call()
        kept = self.program.graphs.kept
        return next(c for (_, dims), c in kept.items() if dims == self.binding.dims).graph.replay

    @property
    def launches(self) -> int:
        return len(self.program.executable.launches)


class Session:
    """fast: the model, optimized; it has been called once, with `shape`."""

    def __init__(
        self, name: str, dtype: str, layers: int | None = None, shape: tuple[int, int] = (1, 40),
        **options: Any,
    ) -> None:  # fmt: skip
        self.dtype = DTYPES[dtype]
        self.model = make_model(name, self.dtype, layers)
        self.fast = turbotx.optimize(self.model, **options)
        self.engine = engine_of(self.fast)
        self.fast(**self.inputs(shape))
        ((_, self.variant),) = self.engine.keyed_variants()

    def inputs(self, shape: tuple[int, int], padded: bool = False) -> dict[str, torch.Tensor]:
        return make_inputs(self.model, *shape, self.dtype, padded)

    def bind(
        self, shape: tuple[int, int], folded: bool | None = None, **options: Any
    ) -> Bound:  # fmt: skip
        """Return the call at a shape. folded: which of the two programs, None: the one that serves
        the shape."""
        tensors = list(self.inputs(shape).values())
        dims = self.variant.matcher.match([t.shape for t in tensors])
        assert dims is not None
        compiled = self.variant.compiled
        call, chosen = compiled.unbound.call, compiled.at(dims).specialization.assembled
        if folded is not None:
            chosen = call.programs[int(folded)]
        alone = replace(call, programs=(chosen,))
        program = self.engine.bind(alone, make_options(**options)).program
        assert isinstance(program, CudaGraphProgram)
        return Bound(program, program.bind(dims), tensors)
