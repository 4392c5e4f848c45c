"""Refusals: what cannot be captured, said in the user's words before or after the trace is tried.

In: a model, what torch.export made of it, or the error that a trace ended with. Out: a CaptureError
that names the part of the model, or the user's own line, and says what to do::

    cannot capture Net: it changes its own tensor 'steps' in place. Return the new value instead ...
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import OutputKind

from turbotx.errors import CaptureError


def refuse_parts(model: nn.Module) -> None:
    """Raise CaptureError for parameters and buffers without a version: torch.export takes none,
    and a change of them would go unnoticed."""
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise CaptureError(
                f"cannot capture {type(model).__name__}: its {path!r} was made under "
                "torch.inference_mode(), and nothing tells when such a tensor changes. Make or "
                "load the model outside of it (torch.no_grad() is fine); calls may be inside"
            )


def capture_error(name: str, error: Exception) -> CaptureError:
    """Return a CaptureError that points at the deepest frame outside torch and turbotx."""
    inside = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith(inside) and not f.filename.startswith("<")
    ]
    seen = str(error).strip().splitlines() or [type(error).__name__]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    if isinstance(error, CaptureError):
        return CaptureError(f"cannot capture {name}{where}\n  {error}")
    return CaptureError(
        f"cannot capture {name}{where}\n  {type(error).__name__}: {seen[0]}\n"
        "  Every call must be one graph of tensor ops: no Python branch on a tensor's values, no "
        "output that is neither a tensor nor a plain constant (for a decoder pass use_cache=False)."
    )


def refuse_mutation(exported: Any, name: str) -> None:
    """Raise CaptureError where the call changes a buffer or an input: a program could not be run
    by two threads, or again, and mean the same."""
    for spec in exported.graph_signature.output_specs:
        if spec.kind is OutputKind.USER_OUTPUT:
            continue
        what = str(spec.target).removeprefix("model.")
        kind = "an input" if spec.kind is OutputKind.USER_INPUT_MUTATION else "its own tensor"
        raise CaptureError(
            f"cannot capture {name}: it changes {kind} {what!r} in place. Return the new value "
            "instead, or keep that part outside the optimized module"
        )
