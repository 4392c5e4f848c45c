"""Refusals: checks that reject unsupported inputs, weights and modes, by name.

In: tensors, a model, the ambient state, a traced program. Out: nothing, or an error that says what
was seen and what to do::

    refuse_tensor(torch.empty(3, device="meta"))  ->  InputError: an input is on meta, ...
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import OutputKind
from torch.nn.modules.lazy import LazyModuleMixin

from turbotx.capture.ambient import Ambient, unknown_modes
from turbotx.capture.composition import LeftToPyTorch, is_dense
from turbotx.capture.torchao_weights import is_torchao, why_not
from turbotx.errors import CaptureError, InputError, TrainingError
from turbotx.ir.fx_nodes import place_of
from turbotx.ir.memory_order import has_version


def refuse_tensor(tensor: torch.Tensor) -> None:
    """Raise InputError or TrainingError for an input that programs do not support.

    tensor: of any shape and dtype.
    """
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
    """Raise InputError under a mode that intercepts PyTorch's functions, since programs do not call
    them."""
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
    """Raise CaptureError for a parameter or buffer of a subclass with its own computations: fake,
    distributed or quantized tensors. Raises LeftToPyTorch for parameters replaced by plain tensors,
    as `torch.func.functional_call` does for one call."""
    for path, module in model.named_modules():
        refuse_lazy(module, path)
    if not all(isinstance(p, nn.Parameter) for p in model.parameters()):
        raise LeftToPyTorch("the model's parameters are other tensors for this call")
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        own = getattr(type(tensor), "__torch_dispatch__", None)
        if not is_dense(tensor) and own is not torch.Tensor.__torch_dispatch__:
            why = f" ({why_not(tensor)})" if is_torchao(tensor) else ""
            raise CaptureError(
                f"cannot capture {type(model).__name__}: its {path!r} is a {type(tensor).__name__}"
                f"{why}, whose values kernels cannot read. Call the model without turbotx, or "
                "optimize the parts whose weights are plain tensors"
            )


def refuse_lazy(module: nn.Module, path: str = "") -> None:
    """Raise CaptureError for a lazy module before its first call, which makes its parameters and
    sets its class."""
    if isinstance(module, LazyModuleMixin) and "_initialize_hook" in vars(module):
        where = f" at {path!r}" if path else ""
        raise CaptureError(
            f"cannot capture the {type(module).__name__}{where} before its first call, from which "
            "it takes its parameters' sizes: call the model once without turbotx, then optimize it"
        )


def refuse_parts(model: nn.Module) -> None:
    """Raise CaptureError for a model with a part that PyTorch cannot trace."""
    name = type(model).__name__
    for path, module in model.named_modules():
        part = f"its part {path!r}" if path else "it"
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"cannot capture {name}: {part} is TorchScript, whose code runs outside of Python, "
                "so that its branches on sizes cannot be traced. Use the Python module that it was "
                "compiled from, or optimize the parts around it one by one"
            )
        packed = [k for k, v in vars(module).items() if isinstance(v, torch.ScriptObject)]
        if packed:
            raise CaptureError(
                f"cannot capture {name}: {part} ({type(module).__name__}) holds {packed[0]!r}, a "
                f"{vars(module)[packed[0]]._type().name()} packed by PyTorch's own quantisation, "
                "which has no tensors to trace. Optimize the unquantized model"
            )
    refuse_inference_tensors(model)
    refuse_encoder_layers(model)


def refuse_encoder_layers(model: nn.Module) -> None:
    """Raise CaptureError for PyTorch's encoder layers under autocast on CPUs: a fused op runs them
    there, and returns the lower dtype where the layer's code returns float32."""
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
    """Raise CaptureError for parameters and buffers without a version counter: torch.export does
    not accept them, and changes would go unnoticed."""
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not has_version(tensor):
            raise made_in_inference_mode(type(model).__name__, path)


def made_in_inference_mode(name: str, path: str) -> CaptureError:
    """Return the error for a tensor of a model, at `path`, that has no version counter."""
    return CaptureError(
        f"cannot capture {name}: its {path!r} was made under torch.inference_mode(), and nothing "
        "tells when such a tensor changes. Make or load the model outside of it (torch.no_grad() "
        "is fine); calls may be inside"
    )


def refuse_mutation(exported: Any, name: str, inputs: list[str]) -> None:
    """Raise CaptureError if the call mutates a buffer or one of its inputs, of these names: such a
    program could not run in two threads, or twice, with the same result."""
    named = dict(zip(exported.graph_signature.user_inputs, inputs, strict=True))
    places = {node.name: place_of(node) for node in exported.graph.nodes}
    for spec in exported.graph_signature.output_specs:
        if spec.kind is OutputKind.USER_OUTPUT:
            continue
        what = named.get(spec.target, str(spec.target).removeprefix("model."))
        kind = "an input" if spec.kind is OutputKind.USER_INPUT_MUTATION else "its own tensor"
        place = places.get(spec.arg.name, "")
        raise CaptureError(
            f"cannot capture {name}: it changes {kind} {what!r} in place"
            f"{place and f', at {place}'}. Return the new value "
            "instead, or keep that part outside the optimized module"
        )
