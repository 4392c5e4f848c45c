"""Variant: one capture of a call with its guards.

In: a compiled call. Out: its program, which sizes it serves, and whether what it read of the
model's attributes and of globals still holds::

    variant.matcher.match([(2, 17)]), variant.holds()  ->  (2, 17), True
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from turbotx.capture.decisions import Outcomes, UndecidedError, describe_last
from turbotx.capture.module_state.record import Difference
from turbotx.engine.compiled import Compiled
from turbotx.engine.output_builder import OutputBuilder
from turbotx.engine.state_guard import StateGuard
from turbotx.errors import CaptureError
from turbotx.runtime.tensor_watch import start_native_watch

MOST_OUTCOMES = 8
"""How many captures are made of one kind of call for other outcomes of decisions by values."""
REASON_LENGTH = 300
MOST_RECAPTURES = 8
"""How often a state that forward reads and changes itself may be captured anew."""


class Variant:
    """One capture: its compiled program, the matcher that tells which sizes it serves, and the
    guard that tells whether the model's state is as it was.

    guarded: False where something else sees to the state.
    """

    def __init__(self, compiled: Compiled, guarded: bool = True) -> None:
        self.compiled = compiled
        self.program = compiled.program
        self.matcher = compiled.captured.matcher
        self.out_spec = compiled.captured.out_spec
        self.build_output = OutputBuilder(self.out_spec)
        self.effects, self.decisions = compiled.captured.effects, compiled.captured.decisions
        self.looks_back = bool(self.effects) or self.decisions is not None
        """Whether something follows a run, beside returning its results."""
        self.used = 0  # when it was last found for a call, counted in calls
        state = compiled.captured.state if guarded else None
        self.guard = None if state is None else StateGuard(state, _find_library(compiled))
        self.holds: Callable[[], bool] = self.guard.holds if self.guard else lambda: True
        floats = compiled.captured.floats
        self._takes = compiled.captured.takes if any(x.is_particular for x in floats) else None

    def recency(self) -> int:
        """Return what sorts captures of one call that decide otherwise, the latest used first."""
        return 0 if self.decisions is None else -self.used

    def observe(self, outputs: Sequence[Any], dims: Sequence[int]) -> Outcomes:
        """Return () where the decisions of a run came out as they were assumed, else how they came
        out, see `Decisions.observe`; waits for a GPU."""
        decisions = self.decisions
        return () if decisions is None else decisions.observe(outputs[-decisions.count :], dims)

    def leave(self, outputs: Sequence[Any]) -> list[Any]:
        """Leave behind what a call of the model leaves; return the call's own results."""
        count = self.out_spec.num_leaves
        guard = self.guard
        calm = guard is not None and guard.is_untouched()
        for effect in self.effects:
            effect.replay(outputs[count:])
        if guard is not None and calm:
            guard.accept_own()
        return list(outputs[:count])

    def takes(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether the numbers among a call's arguments are those that it serves."""
        return self._takes is None or self._takes(tensors)

    def numbers(self, tensors: Sequence[torch.Tensor]) -> tuple[str, ...]:
        """Return the numbers among a call's arguments, as what tells calls apart."""
        return tuple(float(tensors[x.place].item()).hex() for x in self.compiled.captured.floats)


class Recaptures:
    """Counts captures that were made since a call had changed what it reads itself, and that change
    it again; and those that were made since decisions by values came out otherwise."""

    def __init__(self) -> None:
        self._counts: Counter[Any] = Counter()
        self._otherwise: Counter[Any] = Counter()
        self._undecided: dict[tuple[Any, Outcomes], str] = {}

    def refuse_outcomes(self, key: Any, outcomes: Outcomes) -> None:
        """Count a capture for other outcomes of a kind of call; raise UndecidedError where it
        cannot be made, or too many were."""
        if (key, outcomes) in self._undecided:
            raise UndecidedError(self._undecided[key, outcomes])
        if self._otherwise[key] >= MOST_OUTCOMES:
            raise UndecidedError(
                f"{describe_last(outcomes)}, for which there is no capture, and {MOST_OUTCOMES} "
                "were made for other outcomes of such calls"
            )
        self._otherwise[key] += 1

    def give_up(self, key: Any, outcomes: Outcomes, error: CaptureError) -> UndecidedError:
        """Note that there is no capture for these outcomes, and return the error that says so."""
        told = " ".join(str(error).split("\n")[:2])[:REASON_LENGTH]
        why = f"{describe_last(outcomes)}, and that way cannot be captured: {told}"
        self._undecided[key, outcomes] = why
        return UndecidedError(why)

    def note(self, changed: Iterable[Difference], variant: Variant) -> None:
        """Count a capture that was made because of what `changed`."""
        state = variant.compiled.captured.state
        again = frozenset() if state is None else state.changed_by_calls
        self._counts.update({c.place.key for c in changed if c.by_calls} & again)

    def refuse_endless(self, changed: Iterable[Difference], name: str) -> None:
        """Raise CaptureError where yet another capture would be made in this way."""
        for change in changed:
            if change.by_calls and self._counts[change.place.key] >= MOST_RECAPTURES:
                raise CaptureError(
                    f"{name} was captured {MOST_RECAPTURES} times because its forward changes "
                    f"{change.place.text!r}, which it reads ({change}): every call depends on the "
                    "calls before it. Keep that outside of the optimized module, or pass it as an "
                    "argument"
                )


def _find_library(compiled: Compiled) -> Future[ctypes.CDLL | None]:
    """Return the library of native guards: the program's own runtime, where it is in C++."""
    native = compiled.program.runtime.weights.native
    if native is None:
        return start_native_watch()
    found: Future[ctypes.CDLL | None] = Future()
    found.set_result(native)
    return found
