"""Capture sizes: chooses example sizes, and traces until the capture's guards hold for the call.

In: a model and a call. Out: the capture that serves most sizes, this call's among them, such as::

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
from turbotx.capture.eager import ORDER
from turbotx.capture.size_operators import wants_number
from turbotx.capture.trace import Captured, capture
from turbotx.errors import CaptureError
from turbotx.ir.memory_order import make_dense

LONGER = 7
"""What a size is traced as where 2 turned out to be too short to be free: it has room for a model
that looks a few places back, and is no usual number of anything."""
MOST_SETTLINGS = 8
"""Traces of one call, each on the way that the one before found a decision to come out."""


def capture_sizes(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], outcomes: Outcomes = (),
    settles: bool = True,
) -> Captured:  # fmt: skip
    """Return a capture of a call, with sizes as `_capture_any` has them, whose decisions by values
    come out as the call's own; where none can be made, one for other values.

    outcomes: how the first of them come out, where that is known. settles: whether the call's
    values are those that decide, so that the graph may be run on them. Raises CaptureError where no
    trace succeeds.
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
    """Return how a call's decisions come out by the captured graph, () where as it assumed."""
    decisions = captured.decisions
    dims = captured.matcher.match([t.shape for t in tensors]) if decisions is not None else None
    if decisions is None or dims is None:
        return ()
    inputs = captured.graph.find_nodes(op="placeholder")
    given = [make_dense(t, n.meta[ORDER]) for t, n in zip(tensors, inputs, strict=True)]
    with torch.no_grad(), without_autocast():
        outputs = fx.Interpreter(captured.graph_module).run(*given)
    return decisions.observe(outputs[-decisions.count :], dims)


def _capture_any(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], outcomes: Outcomes
) -> Captured:
    """Return a capture of a call; where none holds for the call, the one for any sizes.

    A size of 1 is traced at 2. Sizes of 1 and 2 are traced longer where that took them for fixed,
    because what the model makes of them (the length less one) was 1. Where the capture does not
    hold for the call (which takes another branch at a length of 1), first the dims that decide are
    numbers, then every 1, then all; all also where the code takes a number and no expression
    (NumPy's functions). Raises CaptureError where no trace succeeds.
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
    for k, (least, fixed) in enumerate(tries):
        if (least, fixed) in tries[:k] or (least, fixed) == (2, set()):
            continue
        try:
            found = capture(model, args, kwargs, least, fixed, outcomes)
        except CaptureError:
            continue
        if found.matcher.match(shapes) is not None:
            return found
    return captured
