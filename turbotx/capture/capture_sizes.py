"""Capture sizes: chooses example sizes, and traces until the capture's guards hold for the call.

In: a model and a call. Out: the capture that serves the most sizes, including the call's, such as::

    capture_sizes(lambda x: x[:, 1:] * 2, (x of (3, 2),), {})  ->  any batch, seq >= 1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from turbotx.capture.ambient import without_autocast
from turbotx.capture.arguments import tensors_of
from turbotx.capture.decisions import Outcomes
from turbotx.capture.result_layouts import ORDER
from turbotx.capture.size_operators import wants_number
from turbotx.capture.trace import Captured, capture
from turbotx.errors import CaptureError
from turbotx.ir.memory_order import make_dense

LONGER = 7
"""The size used instead of 2 where 2 turned out to be too short to stay symbolic: long enough for a
model that looks back a few positions, and unlikely to equal another constant."""
MOST_SETTLINGS = 8
"""The most traces of one call, each of which follows the outcomes that the previous one found."""


def capture_sizes(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], outcomes: Outcomes = (),
    settles: bool = True,
) -> Captured:  # fmt: skip
    """Capture a call, choosing sizes as `_capture_any` does, so that its data-dependent conditions
    come out as they do for the call's values; if that fails, return a capture for other outcomes.

    outcomes: the known outcomes of the first conditions. settles: whether the call's values decide,
    so that the graph may be run on them. Raises CaptureError if no trace succeeds.
    """
    captured = _capture_any(model, args, kwargs, outcomes)
    for _ in range(MOST_SETTLINGS if settles else 0):
        outcomes = _find_otherwise(captured, tensors_of(args, kwargs))
        try:
            captured = _capture_any(model, args, kwargs, outcomes) if outcomes else captured
        except CaptureError:
            return captured
        if not outcomes:
            break
    return captured


def _find_otherwise(captured: Captured, tensors: Sequence[torch.Tensor]) -> Outcomes:
    """Return the outcomes of a call's conditions under the captured graph; () if all are as
    assumed."""
    decisions = captured.decisions
    dims = captured.matcher.match([t.shape for t in tensors]) if decisions is not None else None
    if decisions is None or dims is None:
        return ()
    inputs = captured.graph.find_nodes(op="placeholder")
    given = [make_dense(t, n.meta[ORDER]) for t, n in zip(tensors, inputs, strict=True)]
    with torch.no_grad(), without_autocast():
        outputs = fx.Interpreter(captured.graph_module).run(*given)
    return decisions.observe(outputs, dims)


def _capture_any(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], outcomes: Outcomes
) -> Captured:
    """Capture a call; if no capture holds for the call itself, return the one for free sizes.

    A size of 1 is traced at 2. Sizes of 1 and 2 are traced longer if the trace specialized them
    because a value computed from them (the length less one) was 1. If the capture does not hold for
    the call (the model branches at a length of 1), first the dims that decide become constants,
    then every 1, then all of them. All of them also become constants if the code needs a number
    instead of an expression (NumPy functions). Raises CaptureError if no trace succeeds.
    """
    shapes = [tensor.shape for tensor in tensors_of(args, kwargs)]
    every = {(i, d): n for i, s in enumerate(shapes) for d, n in enumerate(s)}
    try:
        captured = capture(model, args, kwargs, outcomes=outcomes)
    except CaptureError as error:
        if not wants_number(error.__cause__):
            raise
        return capture(model, args, kwargs, fixed=every, outcomes=outcomes)
    traced = zip(captured.input_sizes, shapes, strict=True)
    short = any(n == 2 and m <= 2 for sizes, s in traced for n, m in zip(sizes, s, strict=True))
    matcher = captured.matcher
    if matcher.match(shapes) is not None and not short:
        return captured
    ones = {place for place, n in every.items() if n == 1}
    tries: list[tuple[int, set[tuple[int, int]]]] = [(LONGER, set())] if short else []
    if matcher.match(shapes) is None:
        decide = matcher.find_deciding(shapes) & ones
        tries += [(2, decide), (2, ones), (2, set(every))]
    failed: CaptureError | None = None
    for k, (least, fixed) in enumerate(tries):
        if (least, fixed) in tries[:k] or (least, fixed) == (2, set()):
            continue
        try:
            found = capture(model, args, kwargs, least, fixed, outcomes)
        except CaptureError as error:
            failed = failed or error
            continue
        if found.matcher.match(shapes) is not None:
            return found
    if failed is not None and matcher.match(shapes) is None:
        raise failed
    return captured
