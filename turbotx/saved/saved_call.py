"""Saved call: one program of a saved file, and the calls that it serves.

In: a call's tensors, bound to a shape. Out: the leaves of its output, and the outcomes of its
decisions on values if they differ from what the program assumes::

    call.run(binding, [ids, mask])  ->  [last_hidden_state, ...], ()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from turbotx.capture.ambient import Ambient
from turbotx.capture.decisions import Decisions, Outcomes
from turbotx.capture.shape_matcher import ShapeMatcher
from turbotx.capture.traced_float import FloatInput
from turbotx.errors import SavedFileError
from turbotx.runtime.binding import Binding
from turbotx.runtime.program import Program
from turbotx.saved.gpu_kernels import NoVariantError


@dataclass(frozen=True)
class SavedCall:
    """A program, and the calls that it serves.

    floats, ambient, asked: the numbers and the PyTorch state with which it was traced.
    decisions: what it assumes of tensor values.
    out: the nesting of its output's leaves, as JSON.
    stepping: the indices of the dims that grow with every step of a decoder.
    """

    program: Program
    matcher: ShapeMatcher
    floats: tuple[FloatInput, ...]
    ambient: Ambient
    asked: tuple[int, ...]
    decisions: Decisions | None
    out: Mapping[str, Any]
    stepping: tuple[int, ...] = ()

    def run(self, binding: Binding, tensors: list[torch.Tensor]) -> tuple[list[Any], Outcomes]:
        """Return the leaves of the output, and () or the outcomes of its decisions if they differ
        from those assumed. Raises SavedFileError if a launch of the file cannot run."""
        try:
            with torch.no_grad():
                leaves = self.program.run(binding, tensors)
        except NoVariantError as error:
            dims = zip(self.program.dims, binding.dims, strict=True)
            shown = ", ".join(f"{name}={size}" for name, size in dims)
            raise SavedFileError(f"a call of {shown} cannot run: {error}") from error
        decisions = self.decisions
        if decisions is None:
            return leaves, ()
        return leaves, decisions.observe(leaves[-decisions.count :], binding.dims)
