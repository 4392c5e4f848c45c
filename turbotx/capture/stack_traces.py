"""Stack traces: the source locations of a trace's nodes, formatted once per location.

In: the nodes that a trace makes. Out: in `node.stack_trace` what PyTorch's tracer writes, with the
functions and methods that a `forward` calls, which it leaves out. It formats every frame again for
each node, including the source line, though the calls of equal layers come from the same frames::

    with remembered_stack_traces():  torch.export.export(model, ...)
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType, FrameType
from typing import Any
from unittest import mock

from torch.fx import proxy

from turbotx.ir.fx_nodes import LIBRARIES


@contextmanager
def remembered_stack_traces() -> Iterator[None]:
    """Context manager: format each source location only once in traces."""
    known = _Places()
    # Private parts of PyTorch, the same from 2.11 to 2.13; without one, it formats as before.
    tracer: Any = proxy.TracerBase
    with ExitStack() as stack:
        if hasattr(proxy, "CapturedTraceback"):
            stack.enter_context(mock.patch.object(proxy, "CapturedTraceback", known))
        if hasattr(tracer, "_filter_traceback_frames"):
            wrapped = _filter_once(tracer._filter_traceback_frames)
            stack.enter_context(mock.patch.object(tracer, "_filter_traceback_frames", wrapped))
        yield


class _Stack(traceback.StackSummary):
    """Frames, outermost first, with their cached text."""

    text: list[str] | None = None
    filtered: _Stack | None = None

    def format(self, **kwargs: Any) -> list[str]:
        if self.text is None:
            self.text = super().format(**kwargs)
        return self.text


class _Places:
    """Stands for `CapturedTraceback`; stacks are identified by their code objects and offsets."""

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[int, int], ...], _Stack] = {}
        self._frames: dict[tuple[int, int], traceback.FrameSummary] = {}
        self._codes: dict[int, CodeType] = {}  # keeps ids valid

    def extract(self, **kwargs: Any) -> _Place:
        """Return the caller's stack."""
        frames: list[FrameType] = []
        places: list[tuple[int, int]] = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            frames.append(frame)
            places.append((id(frame.f_code), frame.f_lasti))
            frame = frame.f_back
        key = tuple(places)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = _Stack(
                map(self._describe, reversed(places), reversed(frames))
            )
        return _Place(found)

    def _describe(self, place: tuple[int, int], frame: FrameType) -> traceback.FrameSummary:
        found = self._frames.get(place)
        if found is None:
            code = self._codes[place[0]] = frame.f_code
            made = traceback.FrameSummary(code.co_filename, frame.f_lineno, code.co_name)
            found = self._frames[place] = made
        return found


class _Place:
    def __init__(self, stack: _Stack) -> None:
        self._stack = stack

    def summary(self) -> _Stack:
        """Return the frames."""
        return self._stack


def _filter_once(filter_frames: Any) -> Any:
    def filtered(tracer: Any, summary: Any) -> Any:
        if not isinstance(summary, _Stack):
            return filter_frames(tracer, summary)
        if summary.filtered is None:
            kept = list(map(id, filter_frames(tracer, summary)))
            first = next((k for k, frame in enumerate(summary) if id(frame) in kept), len(summary))
            summary.filtered = _Stack(
                f for f in summary[first:] if id(f) in kept or not f.filename.startswith(LIBRARIES)
            )
        return summary.filtered

    return filtered
