"""Failures: report an unexpected error with the model, the stage and the node.

In: an exception from a stage. Out: the same exception if it is turbotx's own or the machine's (out
of memory); otherwise a CompileError with it as the cause::

    CompileError: turbotx failed on Net in fuse_all (kernels/fusion/fuse.py:141) at softmax ...
      KeyError: 'dim'
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch import fx

from turbotx.capture.decisions import Outcomes, UndecidedError, describe_last
from turbotx.errors import CaptureError, CompileError, TurbotxError
from turbotx.ir.fx_nodes import place_of

HERE = Path(__file__).parents[1]
# Functions that only call stages: the frame below them is the stage.
_DRIVERS = {
    "compile_captured",
    "assemble_call",
    "rewrite_once",
    "rewrite",
    "schedule",
    "_specialize_for_cpu",
    "_specialize_for_gpu",
    "bind",
    "capture",
    "compile",
    "make",
    "at",
    "_bind",
}
_PASSED_ON = (TurbotxError, MemoryError, torch.OutOfMemoryError, OSError)


@contextmanager
def named_failures(model: str) -> Iterator[None]:
    """Convert an unexpected error to a CompileError that says where in `model` it occurred."""
    try:
        yield
    except _PASSED_ON:
        raise
    except Exception as error:
        raise _describe(model, error) from error


def too_many_captures(model: str, rounds: int, outcomes: Outcomes) -> CaptureError:
    """Return the error for a call that `rounds` programs in turn failed to serve."""
    if outcomes:
        return UndecidedError(f"{describe_last(outcomes)}, after {rounds} runs of other ways")
    return CaptureError(
        f"{model} was captured {rounds} times for one call, and its parameters were of another "
        "kind after each capture: does another thread convert it?"
    )


def _describe(model: str, error: Exception) -> CompileError:
    every = list(_frames(error.__traceback__))
    own = [f for f in every if _own_path(f) and f.tb_frame.f_code.co_filename != __file__]
    stages = [f for f in own if f.tb_frame.f_code.co_name not in _DRIVERS]
    stage = deepest = ""
    if own:
        stage = f" in {(stages or own[-1:])[0].tb_frame.f_code.co_name}"
        deepest = f" ({_own_path(own[-1])}:{own[-1].tb_lineno})"
    said = "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
    return CompileError(
        f"turbotx failed on {model}{stage}{deepest}{_node_of(every)}:\n  {said}\n"
        '  The model is not at fault. Please report it; backend="aten", or optimizing the parts '
        "around it, may do meanwhile"
    )


def _frames(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace is not None:
        yield trace
        trace = trace.tb_next


def _own_path(frame: TracebackType) -> str:
    """Return the path of a frame's code within turbotx, "" if it is elsewhere."""
    path = Path(frame.tb_frame.f_code.co_filename)
    return path.relative_to(HERE).as_posix() if path.is_relative_to(HERE) else ""


def _node_of(frames: list[TracebackType]) -> str:
    """Return " at NODE (SOURCE)" for the node that the innermost function worked on."""
    for frame in reversed(frames):
        for value in reversed(list(frame.tb_frame.f_locals.values())):
            if isinstance(value, fx.Node):
                place = place_of(value)
                return f" at {value.name}" + (f" ({place})" if place else "")
    return ""


def without_frames(error: CaptureError) -> CaptureError:
    """Return a copy of an error without causes and traceback, whose frames hold the trace and the
    call's arguments."""
    made = type(error).__new__(type(error), *error.args)
    made.__dict__.update(vars(error))
    return made
