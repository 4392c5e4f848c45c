"""Generation in simulated time: the same scheduler and slots, over what steps are said to cost.

In: requests (when, prompt, tokens), limits, costs in ms. Out: when each got its first token and its
last one, the most blocks that were taken, how many gave way::

    simulate([Arrival(0.0, 40, 100)], GenerationLimits(), StepCosts())
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from turbotx.serving.generation.prefixes import PrefixBlock, PrefixTree
from turbotx.serving.generation.reading import Prompted, PromptReading, lay_out
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
    shared: int = 0  # tokens that the prompt begins with, the same ones in all that have some


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
        """As many tokens as are to be read, shared ones first, then such as no other sequence
        has."""
        first, shared = id(self) << 20, self.arrival.shared
        return [*range(shared), *range(first, first + self.arrival.prompt + self.made - shared)]

    @property
    def most(self) -> int:
        """Positions that it takes at its end."""
        return self.arrival.prompt + self.arrival.tokens


@dataclass
class GenerationOutcome:
    """What became of all requests, in order of arrival."""

    sequences: list[Simulated] = field(default_factory=list)
    most_used: int = 0
    cached: int = 0  # tokens of prompts that were not read
    preemptions: int = 0
    end_ms: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens that were made in each second from the beginning to the end."""
        return 1e3 * sum(s.made for s in self.sequences) / self.end_ms


@dataclass
class CountedBlocks:
    """How many references there are to each block."""

    references: Counter[int] = field(default_factory=Counter)

    def share(self, ids: NDArray[np.int64]) -> None:
        """Add a reference to each."""
        self.references.update(ids.tolist())

    def release(self, ids: NDArray[np.int64]) -> None:
        """Drop a reference to each."""
        self.references.subtract(ids.tolist())


@dataclass
class SimulatedBlocks:
    """The blocks of those who decode and of a reading; prefixes are kept of prompts alone."""

    slots: Slots
    piece: int
    most_blocks: int = 1 << 30
    reading: PromptReading | None = None
    tree: PrefixTree = field(default_factory=PrefixTree)
    _held: dict[Hashable, PrefixBlock] = field(default_factory=dict)

    def lay_out(self, sequences: Sequence[Prompted]) -> PromptReading:
        """Return how prompts would be read together."""
        return lay_out(sequences, self.slots, self.tree, self.piece, self.most_blocks * BLOCK)

    def begin(self, reading: PromptReading) -> None:
        """Begin to read prompts."""
        self.reading = reading
        for row in reading.rows:
            for key in row.keys:
                self.tree.hold(row.prefix)
                self._held[key] = row.prefix

    def read(self) -> int:
        """Read a piece; return of how many columns it is."""
        assert self.reading is not None
        columns, self.reading.done = self.reading.next - self.reading.done, self.reading.next
        self.reading.next = min(self.reading.length, self.reading.done + self.piece)
        return columns

    def join(self) -> None:
        """Let all who were read decode, and keep their full blocks."""
        reading, self.reading = self.reading, None
        assert reading is not None
        entries = []
        for row in reading.rows:
            mask = reading.mask_of(row)
            entries += [Entry(key, len(mask) - int(mask.argmax())) for key in row.keys]
            table = np.zeros((1, len(mask) // BLOCK), np.int64)
            for key in row.keys:
                self._held[key] = self.tree.add(self._held[key], row.prompt, mask, table)
        if entries:
            self.slots.join(entries, reading.end)

    def leave(self, sequence: Hashable) -> None:
        """Let a sequence's blocks go."""
        self.slots.leave(sequence)
        if self.reading is not None:
            for row in self.reading.rows:
                row.keys = [key for key in row.keys if key is not sequence]
            self.reading.rows = [row for row in self.reading.rows if row.keys]
            self.reading = self.reading if self.reading.rows else None
        if sequence in self._held:
            self.tree.let_go(self._held.pop(sequence))

    @property
    def used(self) -> int:
        """Blocks that are taken, known ones once."""
        chains = {key: block.chain() for key, block in self._held.items()}
        known = {block for chain in chains.values() for block in chain}
        rows = self.slots.blocks - sum(len(chains.get(e.key, ())) for e in self.slots.rows)
        return rows + len(known) + (0 if self.reading is None else self._read(self.reading.done))

    def needed(self) -> int:
        """Blocks that the next turn takes at the most."""
        reading, step = self.reading, len(self.slots.rows) * (self.slots.length % BLOCK == 0)
        if reading is None:
            return step
        ends = reading.next == reading.length and reading.end % BLOCK == 0
        read = self._read(reading.next) - self._read(reading.done)
        return step + read + len(reading.rows) * ends

    def _read(self, done: int) -> int:
        """Return how many blocks the columns of a reading have that are not known."""
        reading = self.reading
        assert reading is not None
        return len(reading.rows) * -(-(reading.pad + done) // BLOCK)


def simulate(
    arrivals: Sequence[Arrival], limits: GenerationLimits, costs: StepCosts | None = None
) -> GenerationOutcome:
    """Run all requests to their end."""
    costs = costs or StepCosts()
    scheduler, slots = GenerationScheduler(limits), Slots()
    tree = PrefixTree(CountedBlocks() if limits.prefix_cache else None)
    blocks = SimulatedBlocks(slots, limits.prefill_tokens, limits.max_blocks, tree=tree)
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
        if turn.begin is not None:
            blocks.begin(turn.begin)
            outcome.cached += sum(row.cached for row in turn.begin.rows)
        if turn.read:
            reading = blocks.reading
            assert reading is not None
            now_ms += len(reading.rows) * blocks.read() * costs.prompt_ms
            if reading.done == reading.length:
                for sequence in reading.keys:
                    assert isinstance(sequence, Simulated)
                    make_token(sequence)
                scheduler.have_read()
                if blocks.reading is not None:
                    blocks.join()
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
