"""Variant: one capture of a call with its guards.

In: a compiled call. Out: its program, the sizes that it serves, and whether the module attributes
and globals that it read are unchanged::

    variant.matcher.match([(2, 17)]), variant.holds()  ->  (2, 17), True
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from turbotx.capture.decisions import Outcomes, UndecidedError, describe_last
from turbotx.capture.module_state.record import Difference
from turbotx.capture.returned_arguments import give_back
from turbotx.engine.compiled import Compiled
from turbotx.engine.output_builder import OutputBuilder
from turbotx.engine.state_guard import StateGuard
from turbotx.errors import CaptureError, reason_of
from turbotx.runtime.tensor_watch import start_native_watch

MOST_OUTCOMES = 8
"""Maximum number of captures of one kind of call for different outcomes of its decisions."""
MOST_RECAPTURES = 8
"""Maximum number of recaptures caused by state that forward both reads and changes."""


class Variant:
    """One capture: its compiled program, the matcher for sizes, and the guard of the model's state.

    guarded: False if something else guards the state.
    """

    def __init__(self, compiled: Compiled, guarded: bool = True) -> None:
        self.compiled = compiled
        self.program = compiled.program
        self.matcher = compiled.captured.matcher
        self.out_spec = compiled.captured.out_spec
        self.build_output = OutputBuilder(self.out_spec)
        self._returned = compiled.captured.returned
        self.effects, self.decisions = compiled.captured.effects, compiled.captured.decisions
        self.needs_post_run = bool(self.effects) or self.decisions is not None
        """Whether a run is followed by more work than returning its results."""
        self.used = 0  # the engine's call counter at its last use
        state = compiled.captured.state if guarded else None
        self.guard = None if state is None else StateGuard(state, _find_library(compiled))
        self.holds: Callable[[], bool] = self.guard.holds if self.guard else lambda: True
        floats = compiled.captured.floats
        looks = any(x.is_particular for x in floats) or compiled.captured.sought
        self._takes = compiled.captured.takes if looks else None

    def build(self, leaves: Sequence[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the output of these leaves, with the arguments that it holds filled anew."""
        output = self.build_output(leaves)
        return give_back(self._returned, args, kwargs, output) if self._returned else output

    def recency(self) -> int:
        """Sort key: among captures of one call with different decisions, the most recently used
        first."""
        return 0 if self.decisions is None else -self.used

    def observe(self, outputs: Sequence[Any], dims: Sequence[int]) -> Outcomes:
        """Return () if the decisions of a run came out as assumed, otherwise their outcomes, see
        `Decisions.observe`; synchronizes with a GPU."""
        decisions = self.decisions
        return () if decisions is None else decisions.observe(outputs, dims)

    def apply_effects(self, outputs: Sequence[Any]) -> list[Any]:
        """Apply the side effects of a call of the model; return the call's own results."""
        count = self.out_spec.num_leaves
        guard = self.guard
        calm = guard is not None and guard.is_untouched()
        for effect in self.effects:
            effect.replay(outputs[count:])
        if guard is not None and calm:
            guard.accept_own()
        return list(outputs[:count])

    def takes(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether it serves a call with these numbers and tensors among its arguments."""
        return self._takes is None or self._takes(tensors)

    def numbers(self, tensors: Sequence[torch.Tensor]) -> tuple[str, ...]:
        """Return the numbers among a call's arguments, as a part of the key that identifies it."""
        return tuple(float(tensors[x.place].item()).hex() for x in self.compiled.captured.floats)


class Recaptures:
    """Counts recaptures of two causes: a call changed state that it reads itself, or decisions on
    tensor values came out differently."""

    def __init__(self) -> None:
        self._counts: Counter[Any] = Counter()
        self._otherwise: Counter[Any] = Counter()
        self._undecided: dict[tuple[Any, Outcomes], str] = {}

    def refuse_outcomes(self, key: Any, outcomes: Outcomes) -> None:
        """Count a capture for other outcomes of a kind of call; raise UndecidedError if that cannot
        be captured or the limit is reached."""
        if (key, outcomes) in self._undecided:
            raise UndecidedError(self._undecided[key, outcomes])
        if self._otherwise[key] >= MOST_OUTCOMES:
            raise UndecidedError(
                f"{describe_last(outcomes)}, for which there is no capture, and {MOST_OUTCOMES} "
                "were made for other outcomes of such calls"
            )
        self._otherwise[key] += 1

    def give_up(self, key: Any, outcomes: Outcomes, error: CaptureError) -> UndecidedError:
        """Record that these outcomes cannot be captured; return the error that says so."""
        why = f"{describe_last(outcomes)}, and that way cannot be captured: {reason_of(error)}"
        self._undecided[key, outcomes] = why
        return UndecidedError(why)

    def note(self, changed: Iterable[Difference], variant: Variant) -> None:
        """Count a capture that was made because of `changed`."""
        state = variant.compiled.captured.state
        again = frozenset() if state is None else state.changed_by_calls
        self._counts.update({c.place.key for c in changed if c.by_calls} & again)

    def refuse_endless(self, changed: Iterable[Difference], name: str) -> None:
        """Raise CaptureError if the limit of recaptures for one of these changes is reached."""
        for change in changed:
            if change.by_calls and self._counts[change.place.key] >= MOST_RECAPTURES:
                raise CaptureError(
                    f"{name} was captured {MOST_RECAPTURES} times because its forward changes "
                    f"{change.place.text!r}, which it reads ({change}): every call depends on the "
                    "calls before it. Keep that outside of the optimized module, or pass it as an "
                    "argument"
                )


def _find_library(compiled: Compiled) -> Future[ctypes.CDLL | None]:
    """Return the library with the native guards: the program's own runtime if that is in C++."""
    native = compiled.program.runtime.weights.native
    if native is None:
        return start_native_watch()
    found: Future[ctypes.CDLL | None] = Future()
    found.set_result(native)
    return found
