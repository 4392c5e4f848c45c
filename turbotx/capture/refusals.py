"""Refusals: checks that reject inputs, weights and modes that no program supports, by name.

In: tensors, a model, the state around a call, a traced program. Out: nothing, or an error that says
what was seen and what to do::

    refuse_tensor(torch.empty(3, device="meta"))  ->  InputError: an input is on meta, ...
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import OutputKind

from turbotx.capture.ambient import Ambient, unknown_modes
from turbotx.capture.composition import LeftToPyTorch, is_dense
from turbotx.errors import CaptureError, InputError, TrainingError


def refuse_tensor(tensor: torch.Tensor) -> None:
    """Raise InputError, or TrainingError, for an input that no program takes. x: of any shape and
    dtype."""
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


def refuse_modes(ambient: Ambient) -> None:
    """Raise InputError for a call under a mode that intercepts PyTorch's functions: a program
    does not call them."""
    names = unknown_modes(ambient)
    if names:
        raise InputError(
            f"the call is made under {', '.join(names)}, which intercepts PyTorch's functions, and "
            "a compiled program does not call them: leave the mode around the call, or call the "
            "model that was given to turbotx.optimize"
        )


def refuse_gradient() -> None:
    """Raise TrainingError: an input requires grad while gradients are enabled."""
    raise TrainingError(
        "an input requires grad, and turbotx is for inference only: call it under "
        "torch.no_grad(), or pass input.detach()"
    )


def refuse_foreign_weights(model: nn.Module) -> None:
    """Raise CaptureError for a parameter or buffer that computes by code of its own: fake,
    distributed, quantised by a subclass; LeftToPyTorch for parameters that are none, as
    `torch.func.functional_call` puts them in place for one call."""
    if not all(isinstance(p, nn.Parameter) for p in model.parameters()):
        raise LeftToPyTorch("the model's parameters are other tensors for this call")
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        own = getattr(type(tensor), "__torch_dispatch__", None)
        if not is_dense(tensor) and own is not torch.Tensor.__torch_dispatch__:
            raise CaptureError(
                f"cannot capture {type(model).__name__}: its {path!r} is a {type(tensor).__name__},"
                " whose values kernels cannot read. Call the model without turbotx, or optimize "
                "the parts whose weights are plain tensors"
            )


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
    refuse_inference_tensors(model)
    refuse_encoder_layers(model)


def refuse_encoder_layers(model: nn.Module) -> None:
    """Raise CaptureError for PyTorch's encoder layers under autocast on CPUs: a fused op of its own
    runs them there, whose results are of the lower dtype where the layer's code gives float32."""
    fused = torch.is_autocast_enabled("cpu") and torch.backends.mha.get_fastpath_enabled()
    for path, module in model.named_modules() if fused else ():
        if isinstance(module, nn.TransformerEncoderLayer):
            raise CaptureError(
                f"cannot capture {type(model).__name__}: its part {path!r} is a "
                "nn.TransformerEncoderLayer under autocast, where PyTorch's fast path gives other "
                "dtypes than the layer's code. torch.backends.mha.set_fastpath_enabled(False) "
                "turns that path off, or convert the model by .to(torch.bfloat16)"
            )


def refuse_inference_tensors(model: nn.Module) -> None:
    """Raise CaptureError for parameters and buffers without a version: torch.export takes none,
    and a change of them would go unnoticed."""
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise made_in_inference_mode(type(model).__name__, path)


def made_in_inference_mode(name: str, path: str) -> CaptureError:
    """Return the error for a tensor of a model, found at `path`, that has no version."""
    return CaptureError(
        f"cannot capture {name}: its {path!r} was made under torch.inference_mode(), and nothing "
        "tells when such a tensor changes. Make or load the model outside of it (torch.no_grad() "
        "is fine); calls may be inside"
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
