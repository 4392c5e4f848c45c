"""Trace errors: translates failures of torch.export into errors that name the user's source.

In: an error of the model's code or of torch.export. Out: a CaptureError that names the user's own
line and says what to do::

    cannot capture Net at net.py:12: return x[: int(n)] ...
"""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

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


def capture_error(name: str, error: Exception) -> CaptureError:
    """Return a CaptureError that points at the deepest frame outside torch and turbotx."""
    inside = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith(inside)
        and not f.filename.startswith("<")
        and not f.filename.endswith("contextlib.py")
    ]
    seen = str(error).strip().splitlines() or [type(error).__name__]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    if isinstance(error, CaptureError):
        return CaptureError(f"cannot capture {name}{where}\n  {error}")
    if type(error).__name__ in _ASKS_FOR_VALUES:
        return CaptureError(
            f"cannot capture {name}{where}\n  It asks for a number that a tensor holds "
            "(int(tensor), a slice up to one), or for as many elements as one "
            f"says.\n  {type(error).__name__}: {seen[0]}\n  Compute such numbers outside of the "
            "optimized module and pass them as sizes or as numbers, or use a mask of full size; "
            f"{BREAKS}"
        )
    return CaptureError(
        f"cannot capture {name}{where}\n  {type(error).__name__}: {seen[0]}\n"
        "  Where the same call of the plain model fails too, its arguments do not fit the model. "
        "Otherwise: a call must be one graph of tensor ops, without sizes that depend on values of "
        "tensors and without an output that is neither a tensor nor a plain constant (for a "
        f"decoder pass use_cache=False); {BREAKS}"
    )
