"""Refusals: what cannot be captured, said in the user's words before or after the trace is tried.

In: a model, or the error that a trace ended with. Out: a CaptureError that names the part of the
model, or the user's own line, and says what to do::

    cannot capture Net: its part 'head' is TorchScript, ...
"""

from __future__ import annotations

import traceback
from pathlib import Path

import torch
from torch import nn

from turbotx.ambient import Ambient, unknown_modes
from turbotx.errors import CaptureError, InputError, TrainingError


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


def refuse_parts(model: nn.Module) -> None:
    """Raise CaptureError for a model with a part that no trace of PyTorch can look into."""
    name = type(model).__name__
    for path, module in model.named_modules():
        part = f"its part {path!r}" if path else "it"
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"cannot capture {name}: {part} is TorchScript, whose code runs outside of Python, "
                "with decisions on sizes that nothing tells of. Put the Python module that it was "
                "made from in its place, or optimize the parts around it one by one"
            )
        packed = [k for k, v in vars(module).items() if isinstance(v, torch.ScriptObject)]
        if packed:
            raise CaptureError(
                f"cannot capture {name}: {part} ({type(module).__name__}) holds {packed[0]!r}, a "
                f"{vars(module)[packed[0]]._type().name()} packed by PyTorch's own quantisation, "
                "which has no tensors to trace. Optimize the model as it was before that"
            )
    _refuse_inference_tensors(model)


def _refuse_inference_tensors(model: nn.Module) -> None:
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
        if not f.filename.startswith(inside)
        and not f.filename.startswith("<")
        and not f.filename.endswith("contextlib.py")
    ]
    seen = str(error).strip().splitlines() or [type(error).__name__]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    if type(error).__name__ in _ASKS_FOR_VALUES:
        return CaptureError(
            f"cannot capture {name}{where}\n  It asks for a number that a tensor holds (.item(), "
            "int(tensor), a branch on one, a slice up to one), or for as many elements as one "
            f"says.\n  {type(error).__name__}: {seen[0]}\n  Compute such numbers outside of the "
            "optimized module and pass them as sizes or as numbers, or use a mask of full size"
        )
    return CaptureError(
        f"cannot capture {name}{where}\n  {type(error).__name__}: {seen[0]}\n"
        "  Every call must be one graph of tensor ops: no Python branch on a tensor's values, no "
        "output that is neither a tensor nor a plain constant (for a decoder pass use_cache=False)."
    )


def refuse_tensor(tensor: torch.Tensor) -> None:
    """Raise InputError, or TrainingError, for an input that no program takes."""
    if tensor.is_nested:
        raise InputError("an input is a nested tensor; turbotx takes plain dense tensors only")
    if tensor.device.type not in ("cpu", "cuda"):
        raise InputError(
            f"an input is on {tensor.device}, and turbotx runs on CPUs and NVIDIA GPUs: move the "
            'model and its inputs with .to("cpu") or .to("cuda")'
        )
    if tensor.layout is not torch.strided or tensor.is_quantized:
        kind = f"dtype {tensor.dtype}" if tensor.is_quantized else f"layout {tensor.layout}"
        raise InputError(f"an input has {kind}; turbotx takes plain dense tensors only")
    if tensor.requires_grad and torch.is_grad_enabled():
        refuse_gradient()


def refuse_gradient() -> None:
    """Raise TrainingError for an input that requires grad."""
    raise TrainingError(
        "an input requires grad, and turbotx is for inference only: call it under "
        "torch.no_grad(), or pass input.detach()"
    )


def refuse_modes(ambient: Ambient) -> None:
    """Raise InputError: a program is not PyTorch's functions: nothing would intercept them."""
    names = unknown_modes(ambient)
    if names:
        raise InputError(
            f"the call is made under {', '.join(names)}, which intercepts PyTorch's functions, and "
            "a compiled program does not call them: leave the mode around the call, or call the "
            "model that was given to turbotx.optimize"
        )
