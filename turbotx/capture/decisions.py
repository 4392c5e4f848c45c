"""Decisions: the branches on values of tensors that a capture took, looked at after every run.

In: the values that a program gives beside its results, and the dims of the call. Out: () where
all came out as the trace assumed, or else how they come out, up to the first that differs::

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
"""How the first decisions of a call came out, each with its line of source."""


@dataclass(frozen=True)
class AssumedCondition:
    """condition: one text over the dims and the values. outcome: what the trace assumed of it.
    where: the user's line, in messages."""

    condition: Sizes
    outcome: bool
    where: str


@dataclass(frozen=True)
class Decisions:
    """What a capture assumed of values. names: the dims, then the values by the places at which
    they come after the program's other results. count: how many these values are."""

    names: tuple[str, ...]
    count: int
    made: tuple[AssumedCondition, ...]

    def observe(self, values: Sequence[torch.Tensor], dims: Sequence[int]) -> Outcomes:
        """Return () where every decision comes out as it was assumed, else the outcomes up to
        the first that does not; what follows that one was computed on the wrong way.

        values: of no dims; on a GPU this waits for the run to end.
        """
        numbers = (*dims, *_read(values))
        try:
            if self._evaluate(*numbers) == self._outcomes:
                return ()
        except (ArithmeticError, ValueError):  # perhaps of a decision behind one that differs
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
        """Return whether the first decisions were assumed to come out so."""
        own = tuple(d.outcome for d in self.made[: len(outcomes)])
        return own == tuple(outcome for _, outcome in outcomes)

    @cached_property
    def _outcomes(self) -> tuple[bool, ...]:
        return tuple(d.outcome for d in self.made)

    @cached_property
    def _evaluate(self) -> Evaluate:
        return Sizes(tuple(t for d in self.made for t in d.condition.texts)).compile(self.names)


class UndecidedError(CaptureError):
    """A call's decisions come out as no capture assumed, and none can be made of it: the model
    itself answers it."""


def describe_last(outcomes: Outcomes) -> str:
    """Return in words which decision came out otherwise than it was assumed, and how."""
    where, outcome = outcomes[-1]
    return f"the condition by a tensor's values at {where} came out {outcome}, not {not outcome}"


def _read(values: Sequence[torch.Tensor]) -> list[bool | int | float]:
    """Return the numbers in tensors of no dims, with one transfer a dtype."""
    found: dict[int, bool | int | float] = {}
    for dtype in {value.dtype for value in values}:
        places = [k for k, value in enumerate(values) if value.dtype is dtype]
        read = torch.stack([values[k] for k in places]).tolist()
        found.update(zip(places, read, strict=True))
    return [found[k] for k in range(len(values))]
