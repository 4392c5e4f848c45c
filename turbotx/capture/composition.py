"""Composition: detects that an optimized model is being traced, and leaves the call to PyTorch.

In: what is at work in this thread, and the arguments of a call. Out: whether the original is to
run, as inside of another capture, `torch.compile`, `torch.export`, `make_fx`, `torch.func.vmap`::

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

from turbotx.errors import InputError


class LeftToPyTorch(InputError):
    """A call has tensors that only PyTorch can compute with: the original is to run."""


class _Around(threading.local):
    alone = False


_around = _Around()
_is_dynamo = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_is_tracing = torch._C._is_tracing


def left_to_pytorch() -> bool:
    """Return whether a call that begins now in this thread must run in PyTorch: it is being traced,
    transformed or observed op by op, and native kernels would be invisible to that."""
    return (
        _is_dynamo()  # first: Dynamo takes it for True, and looks no further
        or _around.alone
        or _dispatch_modes() != 0
        or _transforms() is not None
        or _is_tracing()
        or forward_ad._current_level >= 0
        or (_function_modes() != 0 and _is_observed())
    )


def _is_observed() -> bool:
    """Tell a mode that sees every call from one that only says where new tensors lie."""
    return not all(isinstance(m, DeviceContext) for m in _get_current_function_mode_stack())


@contextmanager
def left_alone() -> Iterator[None]:
    """Call optimized models as they were in this thread, inside the context: for a trace, or for a
    comparison with the original."""
    before, _around.alone = _around.alone, True
    try:
        yield
    finally:
        _around.alone = before


def is_dense(tensor: Any) -> bool:
    """Return whether a tensor owns real memory, unlike a fake, proxy or distributed tensor."""
    return type(tensor) is torch.Tensor or type(tensor) is nn.Parameter


def leave_foreign(leaves: Iterable[Any]) -> None:
    """Raise LeftToPyTorch where an argument is a tensor of a subclass, or a proxy of a trace."""
    for leaf in leaves:
        if not is_dense(leaf) and hasattr(type(leaf), "__torch_function__"):
            raise LeftToPyTorch(
                f"an argument is a {type(leaf).__name__}: turbotx computes with plain tensors only"
            )


def calls_forward(model: nn.Module) -> bool:
    """Return whether a call of the model is its `forward` and hooks: its class has no other way."""
    if isinstance(model, fx.GraphModule):
        return True  # its own way names the line of an error
    return not any(
        "__call__" in vars(c) and not vars(c).get("turbotx_adds_nothing", False)
        for c in type(model).__mro__
        if c is not nn.Module
    )
