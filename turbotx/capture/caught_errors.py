"""Caught errors: refuses code that goes on after an operator, or turbotx itself, has raised.

In: the model's code, traced while this mode is active. Out: nothing, or an error that names the
line whose error the code has caught. For which sizes and values an operator raises is not known to
a trace, so that a program could not tell which way a call goes; and what a trace refuses, eager
mode does::

    try:  y = x.view(-1)                         try:  n = int(x.sum())
    except RuntimeError:  y = x.reshape(-1)      except Exception:  n = 0
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

from torch.overrides import TorchFunctionMode

from turbotx.capture.module_state.values import is_library
from turbotx.errors import CaptureError, kind_and_line, noted_errors


class CaughtErrors(TorchFunctionMode):
    """While active, notes the first operator that raises, and the refusals of the trace."""

    def __init__(self) -> None:
        super().__init__()
        self._first: tuple[Exception, str] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> CaughtErrors:
        self._refusals = self._stack.enter_context(noted_errors())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except AttributeError:  # of a getter: hasattr(x, "grad_dtype")
            raise
        except Exception as error:
            self._first = self._first or (error, _find_place())
            raise

    def finish(self) -> None:
        """Raise what was raised before the code has returned all the same: the first refusal, or a
        CaptureError that names the operator."""
        for refusal in self._refusals:
            raise refusal
        if self._first is not None:
            error, place = self._first
            raise CaptureError(
                f"its code catches an error that PyTorch raises at {place}\n  "
                f"{kind_and_line(error)}\n  A program cannot tell which calls raise it: ask for "
                "the sizes, dtypes or strides in question instead"
            )


def _find_place() -> str:
    """Return the file and line of the innermost code that is no library's."""
    frame = sys._getframe(2)
    while frame.f_back is not None and is_library(frame.f_globals.get("__name__")):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
