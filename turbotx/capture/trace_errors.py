"""Trace errors: translates failures of torch.export into errors that name the user's source.

In: an exception of the model's code or of torch.export. Out: a CaptureError that names the user's
source line and says what to do::

    cannot capture Net at net.py:12: return x[: int(n)] ...
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import fx, nn

from turbotx.errors import CaptureError, kind_and_line
from turbotx.ir.fx_nodes import place_of

aten = torch.ops.aten
_PRODUCTS = {
    aten.linear.default: 0, aten.mm.default: 0, aten.matmul.default: 0, aten.bmm.default: 0,
    aten.addmm.default: 1, aten.baddbmm.default: 1,
}  # fmt: skip
"""Where the two matrices begin among the arguments."""


class Stopped(Exception):
    """Wraps the exception that the model raised under the trace, in `error`. torch.export attaches
    the partial graph to exceptions and prints it; this one refuses the attribute."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error

    def __setattr__(self, name: str, value: object) -> None:
        if name != "partial_fx_graph":
            super().__setattr__(name, value)


# torch.export's exceptions when a tensor's value is needed.
_ASKS_FOR_VALUES = {
    "PendingUnbackedSymbolNotFound", "GuardOnDataDependentSymNode", "DataDependentOutputException",
    "DynamicOutputShapeException",
}  # fmt: skip


_CHECKS = (
    "__init__.py", "_ops.py", "nn/functional.py", "_meta_registrations.py", "_prims", "_refs",
    "_decomp", "_subclasses",
)  # fmt: skip
"""The files in which PyTorch checks shapes and dtypes while tracing."""
_OF_TRACES = ("FakeTensor", "fake tensor", "data pointer", "meta tensor", "subclass")

BREAKS = (
    'or call the model through torch.compile(model, backend="turbotx"), which runs in PyTorch what '
    "cannot be captured"
)
"""The advice for a model that is not a single graph."""


def capture_error(
    name: str, error: Exception, cause: Exception | bool = False, given: str = ""
) -> CaptureError:
    """Return a CaptureError that points at the deepest frame outside torch and turbotx.

    cause: the exception that the model raises at the call's own sizes, True if it raises none,
    False if unknown. given: a description of its arguments.
    """
    for own in (error, cause):
        if isinstance(own, CaptureError):
            return CaptureError(f"cannot capture {name}{_where(own)}\n  {own}")
    asks = [e for e in (error, cause) if type(e).__name__ in _ASKS_FOR_VALUES]
    if asks and isinstance(asks[0], Exception):
        return CaptureError(
            f"cannot capture {name}{_where(error)}\n  It asks for a number that a tensor holds "
            "(int(tensor), a slice up to one), or for as many elements "
            f"as one says.\n  {kind_and_line(asks[0])}\n  Compute such numbers outside of the "
            "optimized module and pass them as sizes or as numbers, or use a mask of full size; "
            f"{BREAKS}"
        )
    if isinstance(cause, Exception) and _is_of_arguments(cause):
        return CaptureError(
            f"cannot capture {name}{_where(cause)}\n  {kind_and_line(cause)}\n  The arguments do "
            f"not fit the model, which raises this without turbotx too. It was given {given}"
        )
    found = ""
    if cause is True:
        found = (
            "The model runs at the sizes of this call; what it does cannot be traced for others. "
        )
    elif cause:
        found = f"If the plain model fails too, look at what it was given: {given}. "
    return CaptureError(
        f"cannot capture {name}{_where(error)}\n  {kind_and_line(error)}\n  {found}A call must be "
        "one graph of tensor ops, without sizes that depend on values of tensors and without an "
        "output that is neither a tensor nor a plain constant (for a decoder, use_cache=False); "
        f"{BREAKS}"
    )


def _is_of_arguments(error: Exception) -> bool:
    """Return whether the original model raises this error too, and not only a trace: its own
    `raise`, a call that does not fit a signature, or an operator's check of shapes and dtypes."""
    text, frames = str(error), traceback.extract_tb(error.__traceback__)
    plain = type(error) in (RuntimeError, ValueError, TypeError, IndexError)
    if not plain or not frames or any(word in text for word in _OF_TRACES):
        return False
    if isinstance(error, TypeError) and "argument" in text:
        return True
    last = Path(frames[-1].filename)
    root = Path(torch.__file__).parent
    if not last.is_relative_to(root):
        return "raise " in (frames[-1].line or "")
    return last.relative_to(root).as_posix().startswith(_CHECKS)


def _where(error: Exception) -> str:
    """Return the line of the model's code that raised the error."""
    inside = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith(inside)
        and not f.filename.startswith("<")
        and not f.filename.endswith("contextlib.py")
    ]
    return f" at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""


def refuse_mixed_products(graph: fx.Graph, name: str, given: str) -> None:
    """Raise CaptureError for a product of matrices of two dtypes, which PyTorch refuses when it
    computes and not while it traces. given: the call's arguments in words."""
    for node in graph.nodes:
        if node.target in _PRODUCTS:
            first = _PRODUCTS[node.target]
            dtypes = [x.meta["val"].dtype for x in node.args[first : first + 2]]
            if dtypes[0] != dtypes[1]:
                place, kinds = place_of(node), [str(d).removeprefix("torch.") for d in dtypes]
                raise CaptureError(
                    f"cannot capture {name}{f' at {place}' if place else ''}\n  It multiplies "
                    f"{kinds[0]} by {kinds[1]}, which PyTorch refuses.\n  Convert the model or "
                    f"what it is given by .to(...). It was given {given}"
                )


def describe_arguments(
    model: nn.Module, names: Sequence[str], tensors: Sequence[torch.Tensor]
) -> str:
    """Describe a call's tensors, and whether one is longer than the model's positions."""
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
