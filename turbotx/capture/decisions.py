"""Decisions: the data-dependent branches that a capture took, checked after every run.

In: the values that a program returns besides its results, and the dims of the call. Out: () if
every condition came out as the trace assumed, otherwise the outcomes up to the first that differs::

    decisions.observe([tensor(9)], (2, 5))  ->  (("net.py:12: assert n.item() <= seq", False),)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch

from turbotx.errors import CaptureError
from turbotx.ir.sizes import Evaluate, Sizes

Outcomes: TypeAlias = tuple[tuple[str, bool], ...]
"""The outcomes of a call's first conditions, each with its source line."""


@dataclass(frozen=True)
class AssumedCondition:
    """A condition on tensor values. condition: one text over the dims and the values. outcome: what
    the trace assumed. where: the user's source line, for messages."""

    condition: Sizes
    outcome: bool
    where: str


@dataclass(frozen=True)
class Decisions:
    """The conditions on tensor values that a capture assumed.

    names: the dims, then the values, named by their indices after the program's other results.
    count: the number of these values.
    """

    names: tuple[str, ...]
    count: int
    made: tuple[AssumedCondition, ...]

    def observe(self, outputs: Sequence[torch.Tensor], dims: Sequence[int]) -> Outcomes:
        """Return () if every condition comes out as assumed, otherwise the outcomes up to the first
        that does not; what follows it was computed on the wrong branch.

        outputs: a run's, the values last, 0-d tensors; on a GPU this waits for the run to end.
        """
        numbers = (*dims, *_read(outputs[-self.count :]))
        try:
            if self._evaluate(*numbers) == self._outcomes:
                return ()
        except (ArithmeticError, ValueError):  # perhaps in a condition after one that differs
            pass
        found: list[tuple[str, bool]] = []
        for decision in self.made:
            try:
                outcome = bool(decision.condition.compile(self.names)(*numbers)[0])
            except (ArithmeticError, ValueError):  # the model itself raises there
                outcome = not decision.outcome
            found.append((decision.where, outcome))
            if outcome != decision.outcome:
                return tuple(found)
        return ()

    def follow(self, outcomes: Outcomes) -> bool:
        """Return whether the first conditions were assumed to have these outcomes."""
        own = tuple(d.outcome for d in self.made[: len(outcomes)])
        return own == tuple(outcome for _, outcome in outcomes)

    @cached_property
    def _outcomes(self) -> tuple[bool, ...]:
        return tuple(d.outcome for d in self.made)

    @cached_property
    def _evaluate(self) -> Evaluate:
        return Sizes(tuple(t for d in self.made for t in d.condition.texts)).compile(self.names)


class UndecidedError(CaptureError):
    """A call's conditions have outcomes that no capture assumed, and none can be made for them; the
    original model answers the call."""


def describe_last(outcomes: Outcomes) -> str:
    """Describe the condition that came out differently than assumed, and its outcome."""
    where, outcome = outcomes[-1]
    return f"the condition by a tensor's values at {where} came out {outcome}, not {not outcome}"


def _read(values: Sequence[torch.Tensor]) -> list[bool | int | float]:
    """Read 0-d tensors to Python numbers, with one transfer per dtype."""
    found: dict[int, bool | int | float] = {}
    for dtype in {value.dtype for value in values}:
        places = [k for k, value in enumerate(values) if value.dtype is dtype]
        read = torch.stack([values[k] for k in places]).tolist()
        found.update(zip(places, read, strict=True))
    return [found[k] for k in range(len(values))]
