"""Generation in simulated time: the same scheduler and slots, over what steps are said to cost.

In: requests (when, prompt, tokens), limits, costs in ms. Out: when each got its first token and its
last one, the most positions that were held, how many gave way::

    simulate([Arrival(0.0, 40, 100)], GenerationLimits(), StepCosts())
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from turbotx.serving.generation.scheduler import GenerationLimits, GenerationScheduler
from turbotx.serving.generation.slots import Entry, Slots
from turbotx.serving.refusals import Refusal


@dataclass(frozen=True)
class Arrival:
    """A request: at `at_ms`, a prompt of so many tokens, and so many to be made."""

    at_ms: float
    prompt: int
    tokens: int
    priority: int = 0


@dataclass(frozen=True)
class StepCosts:
    """ms of a step: of itself, of each sequence, of each thousand positions that it reads; and of
    each token of a prompt."""

    step_ms: float = 14.0
    sequence_ms: float = 0.8
    positions_ms: float = 3.0
    prompt_ms: float = 0.5

    def of_step(self, slots: Slots) -> float:
        """Return what a step of these rows takes."""
        rows = len(slots.rows)
        return (self.step_ms + self.sequence_ms * rows
                + self.positions_ms * rows * slots.length / 1e3)  # fmt: skip


@dataclass(eq=False)
class Simulated:
    """A sequence as the scheduler knows it, and its times in ms; refused: why it never ran."""

    arrival: Arrival
    made: int = 0
    first_ms: float | None = None
    last_ms: float | None = None
    refused: Refusal | None = None

    @property
    def priority(self) -> int:
        """Its request's."""
        return self.arrival.priority

    @property
    def prompt(self) -> Sequence[int]:
        """As many tokens as are to be read."""
        return range(self.arrival.prompt + self.made)

    @property
    def most(self) -> int:
        """Positions that it takes at its end."""
        return self.arrival.prompt + self.arrival.tokens


@dataclass
class GenerationOutcome:
    """What became of all requests, in order of arrival."""

    sequences: list[Simulated] = field(default_factory=list)
    most_held: int = 0
    preemptions: int = 0
    end_ms: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens that were made in each second from the beginning to the end."""
        return 1e3 * sum(s.made for s in self.sequences) / self.end_ms


def simulate(
    arrivals: Sequence[Arrival], limits: GenerationLimits, costs: StepCosts | None = None
) -> GenerationOutcome:
    """Run all requests to their end."""
    costs = costs or StepCosts()
    scheduler, slots = GenerationScheduler(limits), Slots()
    coming = [Simulated(a) for a in sorted(arrivals, key=lambda a: a.at_ms)]
    outcome, now_ms, read = GenerationOutcome(list(coming)), 0.0, 0

    def make_token(sequence: Simulated) -> None:
        sequence.made += 1
        sequence.first_ms = now_ms if sequence.first_ms is None else sequence.first_ms
        if sequence.made == sequence.arrival.tokens:
            sequence.last_ms = now_ms
            scheduler.drop(sequence)
            slots.leave(sequence)

    while coming or len(scheduler):
        if not len(scheduler):
            now_ms = max(now_ms, coming[0].arrival.at_ms)
        while coming and coming[0].arrival.at_ms <= now_ms:
            new = coming.pop(0)
            try:
                scheduler.check(new.arrival.prompt, new.most)
                scheduler.submit([new])
            except Refusal as refusal:
                new.refused = refusal
        for gone in scheduler.give_way(slots):
            slots.leave(gone)
        if slots.held > limits.max_positions:
            slots.tidy(force=True)
        turn = scheduler.next(slots)
        read = 0 if turn.begin else read
        if turn.read:
            reading = [s for s in scheduler.reading if isinstance(s, Simulated)]
            length = max((len(s.prompt) for s in reading), default=0)
            piece = min(limits.prefill_tokens, length - read)
            read += piece
            now_ms += piece * len(reading) * costs.prompt_ms
            if read == length:
                entries = [Entry(s, len(s.prompt)) for s in reading]
                for sequence in reading:
                    make_token(sequence)
                going = [e for e in entries if e.key in scheduler.reading]
                scheduler.have_read()
                if going:
                    slots.join(going)
        if turn.step:
            now_ms += costs.of_step(slots)
            live = slots.live
            slots.advance()
            for entry in live:
                assert isinstance(entry.key, Simulated)
                make_token(entry.key)
        outcome.most_held = max(outcome.most_held, slots.held)
        slots.tidy()
    outcome.preemptions, outcome.end_ms = scheduler.preemptions, now_ms
    return outcome
