"""Trace errors: what a trace ended with, in the user's words.

In: an error of the model's code or of torch.export. Out: a CaptureError that names the user's own
line and says what to do::

    cannot capture Net at net.py:12: return x[: int(n)] ...
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from turbotx.errors import CaptureError


class Stopped(Exception):
    """What the model raised while it was traced, in `error`. torch.export prints the graph so far
    on the screen where an error carries it, so this one carries nothing."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error

    def __setattr__(self, name: str, value: object) -> None:
        if name != "partial_fx_graph":
            super().__setattr__(name, value)


# What torch.export raises where a number of a tensor is asked for.
_ASKS_FOR_VALUES = {
    "PendingUnbackedSymbolNotFound", "GuardOnDataDependentSymNode", "DataDependentOutputException",
    "DynamicOutputShapeException",
}  # fmt: skip


BREAKS = (
    'or call the model through torch.compile(model, backend="turbotx"), which runs in PyTorch what '
    "cannot be captured"
)
"""What a message offers for a model that is no single graph."""


def capture_error(
    name: str, error: Exception, cause: Exception | bool = False, given: str = ""
) -> CaptureError:
    """Return a CaptureError that points at the deepest frame outside torch and turbotx.

    cause: what the model raises for the call's own sizes, True where it raises nothing there, False
    where that is not known. given: its arguments in words.
    """
    if isinstance(error, CaptureError):
        return CaptureError(f"cannot capture {name}{_where(error)}\n  {error}")
    asks = [e for e in (error, cause) if type(e).__name__ in _ASKS_FOR_VALUES]
    if asks and isinstance(asks[0], Exception):
        return CaptureError(
            f"cannot capture {name}{_where(error)}\n  It asks for a number that a tensor holds "
            "(.item(), int(tensor), a branch on one, a slice up to one), or for as many elements "
            f"as one says.\n  {_first_line(asks[0])}\n  Compute such numbers outside of the "
            "optimized module and pass them as sizes or as numbers, or use a mask of full size; "
            f"{BREAKS}"
        )
    if isinstance(cause, Exception):
        return CaptureError(
            f"cannot capture {name}{_where(cause)}\n  {_first_line(cause)}\n  The arguments do "
            f"not fit the model, which raises this without turbotx too. It was given {given}"
        )
    found = (
        "The model runs at the sizes of this call; what it does cannot be traced for others. "
        if cause
        else ""
    )
    return CaptureError(
        f"cannot capture {name}{_where(error)}\n  {_first_line(error)}\n  {found}A call must be "
        "one graph of tensor ops, without a Python branch on a tensor's values and without an "
        "output that is neither a tensor nor a plain constant (for a decoder, use_cache=False); "
        f"{BREAKS}"
    )


def _where(error: Exception) -> str:
    """Return the line of the model's code that raised it."""
    inside = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith(inside)
        and not f.filename.startswith("<")
        and not f.filename.endswith("contextlib.py")
    ]
    return f" at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def describe_arguments(
    model: nn.Module, names: Sequence[str], tensors: Sequence[torch.Tensor]
) -> str:
    """Return a call's tensors in words, and whether one is longer than the model's positions."""
    kinds = (str(t.dtype).removeprefix("torch.") for t in tensors)
    rows = zip(names, kinds, tensors, strict=False)
    given = ", ".join(f"{name} {kind} {list(t.shape)}" for name, kind, t in rows)
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    tokens = [t.shape[1] for t in tensors if t.dim() == 2 and not t.is_floating_point()]
    if isinstance(positions, int) and tokens and max(tokens) > positions:
        given += (
            f": {max(tokens)} tokens, and the model has {positions} positions "
            "(config.max_position_embeddings)"
        )
    return given
