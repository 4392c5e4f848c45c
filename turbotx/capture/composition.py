"""Composition: detects that an optimized model is being traced, and leaves the call to PyTorch.

In: the modes active in this thread, and a call's arguments. Out: whether to run the original model,
as within another capture, `torch.compile`, `torch.export`, `make_fx` or `torch.func.vmap`; and a
property of a module follows where an optimized model takes the place of what it returns::

    with FakeTensorMode(): left_to_pytorch()  ->  True
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from turbotx.capture.module_state.places import CallPlace
from turbotx.capture.module_state.values import is_library
from turbotx.errors import InputError


class LeftToPyTorch(InputError):
    """A call has tensors that only PyTorch can compute with; the original model must run."""


class _ThreadState(threading.local):
    disabled = False


_thread = _ThreadState()
_is_dynamo = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_is_tracing = torch._C._is_tracing


def left_to_pytorch() -> bool:
    """Return whether a call in this thread must run in PyTorch: it is being traced, transformed or
    observed op by op, and native kernels would be invisible to that."""
    return (
        _is_dynamo()  # first: Dynamo evaluates it to True and skips the rest
        or _thread.disabled
        or _dispatch_modes() != 0
        or _transforms() is not None
        or _is_tracing()
        or forward_ad._current_level >= 0
        or (_function_modes() != 0 and _is_observed())
    )


def _is_observed() -> bool:
    """Return whether an active function mode observes every call, and does not only set the device
    of new tensors."""
    return not all(isinstance(m, DeviceContext) for m in _get_current_function_mode_stack())


@contextmanager
def turbotx_disabled() -> Iterator[None]:
    """Context manager: run the original of every optimized model in this thread, for a trace or for
    a comparison with the original."""
    before, _thread.disabled = _thread.disabled, True
    try:
        yield
    finally:
        _thread.disabled = before


def is_dense(tensor: Any) -> bool:
    """Return whether a tensor owns real memory, unlike a fake, proxy or distributed tensor."""
    return type(tensor) is torch.Tensor or type(tensor) is nn.Parameter


def leave_foreign(leaves: Iterable[Any]) -> None:
    """Raise LeftToPyTorch if an argument is a tensor of a subclass or a tracing proxy."""
    for leaf in leaves:
        if not is_dense(leaf) and hasattr(type(leaf), "__torch_function__"):
            raise LeftToPyTorch(
                f"an argument is a {type(leaf).__name__}: turbotx computes with plain tensors only"
            )


def calls_forward(model: nn.Module) -> bool:
    """Return whether calling the model runs only its `forward` and hooks: no class overrides
    `__call__`, and nobody has replaced PyTorch's."""
    if isinstance(model, fx.GraphModule):
        return True  # its __call__ only adds the failing line to an error
    plain = CallPlace(nn.Module).read()
    return is_library(plain.__globals__.get("__name__")) and not any(
        "__call__" in vars(c) and not vars(c).get("turbotx_adds_nothing", False)
        for c in type(model).__mro__
        if c is not nn.Module
    )


def follow_property(module: nn.Module, name: str, value: Any) -> None:
    """Make `holder.auto_model = optimize(holder.auto_model)` work if `auto_model` is a property
    that returns another submodule. Otherwise PyTorch would register a new module that is never
    read.

    A hook of PyTorch's for every module that is made part of another, also by a trace: it stands
    here, so that no trace enters the engine again.
    """
    engine = getattr(type(value), "_turbotx_engine", None)
    if engine is None or not isinstance(getattr(type(module), name, None), property):
        return
    original = value._turbotx_engine.model
    for other, held in list(module._modules.items()):
        if held is original and getattr(module, name) is original:
            module._modules[other] = value
