"""Errors that users of turbotx can meet, one class per kind of mistake.

A message says what was seen, where (the user's own source line when there is one) and what
to do about it, for example::

    CaptureError: cannot capture Encoder: torch.export stopped at model.py:12 ...
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def versions() -> dict[str, str]:
    """Return what a report of a fault has to name: versions of Python and of what is installed."""
    import platform  # not at the top: these take half of what `import turbotx` does
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("turbotx", "torch", "triton", "transformers"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def reason_of(error: BaseException) -> str:
    """Return the first two lines of an error's message as one, of at most 300 characters."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return " ".join(lines[:2])[:300]


def kind_and_line(error: BaseException) -> str:
    """Return an error's class and the first line of its message, as Python prints them."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"


_noting = threading.local()


class TurbotxError(Exception):
    """Base of every error that turbotx raises on purpose."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        note_error(self)


@contextmanager
def noted_errors() -> Iterator[list[Exception]]:
    """Context manager: collect the errors of turbotx that this thread makes, also those that a
    model's code catches, and what `note_error` is given."""
    before, _noting.errors = getattr(_noting, "errors", None), []
    try:
        yield _noting.errors
    finally:
        _noting.errors = before


def note_error(error: Exception) -> None:
    """Add an error to those that this thread collects, if it does."""
    errors = getattr(_noting, "errors", None)
    if errors is not None:
        errors.append(error)


class OptionsError(TurbotxError, ValueError):
    """An option does not exist, or has a value that it cannot take."""


class CaptureError(TurbotxError):
    """The model could not be traced into one graph that holds for any batch and length."""


class PackError(CaptureError):
    """padding="packed" was requested, but the model's graph mixes tokens of different rows."""


class CompileError(TurbotxError):
    """turbotx itself failed on a model: the message names stage and node, the cause is above it."""


class TrainingError(TurbotxError):
    """The model is in training mode, or an input requires grad: turbotx is for inference only."""


class InputError(TurbotxError, ValueError):
    """A call's inputs do not fit what the model was captured for, and a new capture cannot help."""


class CacheFullError(TurbotxError):
    """A decoder's caches would take more bytes than the option `max_cache_nbytes` allows.

    Nothing was changed: further calls work as before.
    """


class IndexOutOfRangeError(TurbotxError, IndexError):
    """An index read by a kernel (a token id, a gather index) lies outside its table."""

    @classmethod
    def of(cls, tensor: str, limit: str, launch: str, source: str) -> IndexOutOfRangeError:
        """Return the error for an index read from `tensor` in a launch. limit: the extent that the
        index must stay below, as text; source: the ops that the launch computes."""
        return cls(
            f"index out of range: a value of {tensor!r} lies outside [0, {limit}) "
            f"in {launch} ({source})"
        )


class ModelError(TurbotxError):
    """MODEL on a command line names nothing that can be loaded."""


class DumpError(TurbotxError):
    """The folder or file to write to cannot be one."""


class WeightsError(TurbotxError, ValueError):
    """A file of weights cannot be read, or does not fit the model; nothing was changed."""


class ModelChangedError(TurbotxError):
    """A parameter is of another dtype, size, layout or device than a program was compiled for.

    `turbotx.optimize` captures anew and does not raise it; a saved program cannot.
    """


class WeightsReleasedError(TurbotxError, RuntimeError):
    """A weight of a model that was optimized with keep_weights=False was to be changed."""


class SaveError(TurbotxError):
    """A model holds something that turbotx.save cannot write."""


class SavedFileError(TurbotxError, ValueError):
    """A file of turbotx.save is damaged, or not for this version or this machine."""


class VerifyError(TurbotxError):
    """An internal invariant does not hold; the message names the node that breaks it."""


class BuildError(TurbotxError):
    """The C++ or GPU compiler refused generated code; the message holds its output."""


class NoCompilerError(BuildError):
    """No C++ compiler was found on this machine."""


class DeviceError(TurbotxError):
    """A GPU cannot be used as asked: it, its driver or Triton is missing, or a launch failed."""


class BuildWarning(UserWarning):
    """Generated kernels cannot be built here, so regions run through ATen instead, or not be kept,
    so that each process builds them."""


class EagerWarning(UserWarning):
    """A part of a model runs in PyTorch instead of turbotx; the message says which and why."""


class QuantizedWarning(UserWarning):
    """Code reads weights that are kept only as int8; it gets dequantized values."""


class DecisionWarning(UserWarning):
    """A branch of the model on a tensor's values was taken otherwise than its program assumed, and
    the call ran again; the message names the line."""
