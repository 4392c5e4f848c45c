"""Generation in simulated time: the same scheduler and slots, over what steps are said to cost.

In: requests (when, prompt, tokens), limits, costs in ms. Out: when each got its first token and its
last one, the most blocks that were taken, how many gave way::

    simulate([Arrival(0.0, 40, 100)], GenerationLimits(), StepCosts())
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from turbotx.serving.generation.scheduler import GenerationLimits, GenerationScheduler
from turbotx.serving.generation.slots import BLOCK, Entry, Slots
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
        """As many tokens as are to be read, other ones than of any other sequence."""
        first = id(self) << 20
        return range(first, first + self.arrival.prompt + self.made)

    @property
    def most(self) -> int:
        """Positions that it takes at its end."""
        return self.arrival.prompt + self.arrival.tokens


@dataclass
class GenerationOutcome:
    """What became of all requests, in order of arrival."""

    sequences: list[Simulated] = field(default_factory=list)
    most_used: int = 0
    preemptions: int = 0
    end_ms: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens that were made in each second from the beginning to the end."""
        return 1e3 * sum(s.made for s in self.sequences) / self.end_ms


@dataclass
class SimulatedBlocks:
    """The blocks of those who decode and of a reading: rows, columns left empty, columns read."""

    slots: Slots
    piece: int
    rows: list[Simulated] = field(default_factory=list)
    pad: int = 0
    length: int = 0
    done: int = 0

    def begin(self, rows: list[Simulated]) -> None:
        """Begin to read prompts."""
        self.rows, self.done, self.length = rows, 0, max(len(s.prompt) for s in rows)
        self.pad = self.slots.pad(self.length, self.piece)

    def leave(self, sequence: Simulated) -> None:
        """Let a sequence's blocks go."""
        self.slots.leave(sequence)
        self.rows = [s for s in self.rows if s is not sequence]

    @property
    def next(self) -> int:
        """Columns that will be read after the next piece."""
        return min(self.length, self.done + self.piece)

    @property
    def used(self) -> int:
        """Blocks that are taken."""
        return self.slots.blocks + len(self.rows) * -(-(self.pad + self.done) // BLOCK)

    def count_prompt(self, length: int) -> int:
        """Blocks that a prompt takes which is read beside others of up to `length` tokens."""
        return -(-(self.slots.pad(length, self.piece) + length) // BLOCK)

    def needed(self) -> int:
        """Blocks that the next turn takes at the most."""
        read = -(-(self.pad + self.next) // BLOCK) + -(self.pad + self.done) // BLOCK
        ends = self.next == self.length and (self.pad + self.length) % BLOCK == 0
        step = len(self.slots.rows) * (self.slots.length % BLOCK == 0)
        return step + len(self.rows) * (read + ends)


def simulate(
    arrivals: Sequence[Arrival], limits: GenerationLimits, costs: StepCosts | None = None
) -> GenerationOutcome:
    """Run all requests to their end."""
    costs = costs or StepCosts()
    scheduler, slots = GenerationScheduler(limits), Slots()
    blocks = SimulatedBlocks(slots, limits.prefill_tokens)
    coming = [Simulated(a) for a in sorted(arrivals, key=lambda a: a.at_ms)]
    outcome, now_ms = GenerationOutcome(list(coming)), 0.0

    def make_token(sequence: Simulated) -> None:
        sequence.made += 1
        sequence.first_ms = now_ms if sequence.first_ms is None else sequence.first_ms
        if sequence.made == sequence.arrival.tokens:
            sequence.last_ms = now_ms
            scheduler.drop(sequence)
            blocks.leave(sequence)

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
        while gone := scheduler.give_way(blocks):
            for sequence in gone:
                assert isinstance(sequence, Simulated)
                blocks.leave(sequence)
        turn = scheduler.next(blocks)
        if turn.begin:
            blocks.begin([s for s in turn.begin if isinstance(s, Simulated)])
        if turn.read:
            now_ms += (blocks.next - blocks.done) * len(blocks.rows) * costs.prompt_ms
            blocks.done = blocks.next
            if blocks.done == blocks.length:
                counts = [(s, len(s.prompt)) for s in blocks.rows]
                for sequence, _ in counts:
                    make_token(sequence)
                going = [Entry(s, n) for s, n in counts if s in blocks.rows]
                end, blocks.rows = blocks.pad + blocks.length, []
                scheduler.have_read()
                if going:
                    slots.join(going, end)
        if turn.step and slots.rows:
            now_ms += costs.of_step(slots)
            live = list(slots.rows)
            slots.advance()
            for entry in live:
                assert isinstance(entry.key, Simulated)
                make_token(entry.key)
        outcome.most_used = max(outcome.most_used, blocks.used)
    outcome.preemptions, outcome.end_ms = scheduler.preemptions, now_ms
    return outcome
