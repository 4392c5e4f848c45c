"""Patched functions: the function of PyTorch that was called, where the user has replaced it.

In: what a mode is given as the function called. Out: the function that handed the call to modes::

    plain = F.softmax;  F.softmax = lambda *args, **kwargs: plain(*args, **kwargs) * 2
    F.softmax(x, -1)    ->  a mode is given the lambda, and unpatched(the lambda) is the plain one

PyTorch's functions that are written in Python look themselves up by name to tell modes which one is
called. A mode that calls what it is given would run the user's code once more for every mode.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from torch.overrides import handle_torch_function

from turbotx.capture.module_state.values import is_library
from turbotx.errors import CaptureError

_TENSOR: Any = torch.Tensor


def unpatched(func: Any) -> Any:
    """Return the function to call in place of `func`; to be called by a mode's method.

    Raises CaptureError for a method of torch.Tensor that the user has replaced, and that calls the
    one before.
    """
    if torch.compiler.is_dynamo_compiling():  # traces what modes do, and cannot look at frames
        return func
    handler = sys._getframe(2)
    if handler.f_code is handle_torch_function.__code__ and handler.f_back is not None:
        asker, code = handler.f_back, handler.f_back.f_code
        named = asker.f_globals.get(code.co_name) is func and not code.co_freevars
        if named and getattr(func, "__code__", None) is not code:
            return _naming_itself(asker)
    scope = getattr(func, "__globals__", None)
    if scope is None or is_library(scope.get("__name__")):
        return func
    names = [name for name, held in vars(_TENSOR).items() if held is func]
    if names:
        raise CaptureError(
            f"torch.Tensor.{names[0]} is replaced by {func.__qualname__} of "
            f"{scope.get('__name__')}, which calls the method from before, and a trace would run "
            "it more than once: replace it outside of the call, or call a function of your own"
        )
    return func


def _naming_itself(frame: types.FrameType) -> types.FunctionType:
    """Return the function of a frame, with the values of its arguments there as defaults. It finds
    itself under its own name."""
    code, values = frame.f_code, frame.f_locals
    scope = dict(frame.f_globals)
    names = code.co_varnames[: code.co_argcount]
    only = code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount]
    given = tuple(values[name] for name in names)
    made = types.FunctionType(code, scope, code.co_name, given)
    made.__kwdefaults__ = {name: values[name] for name in only}
    scope[code.co_name] = made
    return made
