"""Inner modes: gradient and inference mode, as the model's own code sets them around a part of it.

In: a trace, which runs without gradients whatever the caller's mode is. Out: the same trace, in
which the model's code is told what it has set itself, and inference mode computes as `no_grad`
does, since PyTorch traces no tensors that are made in it::

    with torch.no_grad():  torch.is_grad_enabled()            ->  False, also for a caller with it
    with torch.inference_mode():  y = x * 2                   ->  y, not an inference tensor
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd import grad_mode
from torch.utils import _contextlib

from turbotx.capture.module_state.attribute_methods import active
from turbotx.capture.module_state.values import caller_outside

_CONTEXTS = (grad_mode.__name__, _contextlib.__name__, __name__)
_OWN = ("torch._", "torch.autograd", "torch.utils")
_is_grad_enabled = torch.is_grad_enabled
_current = threading.local()


def told_modes() -> tuple[bool | None, bool | None]:
    """Return the gradient and inference mode that traced code of this thread has set."""
    modes: InnerModes | None = getattr(_current, "modes", None)
    return (None, None) if modes is None else (modes.grad, modes.inference)


@dataclass
class _Before:
    """What a context of PyTorch restores at its end. told: what the model's code had set. real: the
    mode of the trace."""

    told: bool | None
    real: bool


class InnerModes:
    """grad, inference: what the model's code has set around what runs now; None if it has set
    nothing."""

    def __init__(self) -> None:
        self.grad: bool | None = None
        self.inference: bool | None = None
        self.thread = threading.get_ident()

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Context manager: follow the modes that the model's code sets, in this thread."""
        names = (("_set_grad_enabled", self._setter), ("_InferenceMode", self._context))
        with ExitStack() as stack:
            for name, make in names:  # private, the same from 2.11 to 2.14
                if hasattr(torch._C, name):
                    own: Any = getattr(torch._C, name)
                    stack.enter_context(patch.object(torch._C, name, make(own)))
            _current.modes = self
            stack.callback(setattr, _current, "modes", None)
            yield

    def look(self) -> _Before:
        """Return what a context of PyTorch that begins now has to restore."""
        return _Before(self.grad, _is_grad_enabled())

    def is_active(self) -> bool:
        """Return whether the model's code runs, in this thread."""
        return threading.get_ident() == self.thread and bool(getattr(active, "recorder", None))

    def _setter(self, own: Callable[[bool], None]) -> Callable[[Any], None]:
        def _set_grad_enabled(mode: Any) -> None:
            if not self.is_active():
                own(mode)
                return
            if isinstance(mode, _Before):
                self.grad, real = mode.told, mode.real
            else:  # gradients that the model's code turns on are of no use to a trace
                self.grad, real = bool(mode), bool(mode) and _asks_pytorch()
            if real != _is_grad_enabled():
                own(real)

        return _set_grad_enabled

    def _context(self, own: Callable[[bool], Any]) -> Callable[[bool], Any]:
        def _InferenceMode(mode: bool) -> Any:
            inside = self.is_active() and not _asks_pytorch()
            return self._set_inference(mode) if inside else own(mode)

        return _InferenceMode

    @contextmanager
    def _set_inference(self, mode: bool) -> Iterator[None]:
        before = self.grad, self.inference
        self.grad, self.inference = not mode, mode
        try:
            yield
        finally:
            self.grad, self.inference = before


def _asks_pytorch() -> bool:
    """Return whether PyTorch sets a mode for itself, as for gradients that it computes; its
    contexts and decorators set one for the code that uses them, as its modules run it."""
    setter = caller_outside(sys._getframe(1), _CONTEXTS)
    return setter is not None and setter.f_globals.get("__name__", "").startswith(_OWN)
