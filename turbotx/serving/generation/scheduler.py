"""Scheduler of generation: whose prompt is read next, who decodes, who has to give way.

In: sequences that arrive, and how many blocks of the cache are taken. Out: one turn at a time, a
piece of prompts to read and whether the running sequences take a step; it has no clock, no model
and no HTTP in it::

    scheduler.submit([sequence])
    scheduler.next(blocks)          ->  SchedulerTurn(begin=PromptReading(...), read=True)

Iterations are scheduled as in Orca (Yu et al., OSDI'22, section 3.1), prompts in pieces beside the
steps as in Sarathi-Serve (Agrawal et al., OSDI'24, section 4): no step waits longer than one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from turbotx.serving.generation.reading import Prompted, PromptReading
from turbotx.serving.generation.slots import BLOCK
from turbotx.serving.refusals import Busy, TooLarge


class Sequenced(Prompted, Protocol):
    """What the scheduler knows of a sequence."""

    @property
    def priority(self) -> int:
        """Its class: -1, 0 or 1, the highest first."""


class Blocks(Protocol):
    """What the scheduler knows of the cache, in blocks of every layer."""

    @property
    def used(self) -> int:
        """Blocks that sequences have; others can be evicted."""

    def needed(self) -> int:
        """Return how many more the next turn takes at the most."""

    def lay_out(self, sequences: Sequence[Prompted]) -> PromptReading:
        """Return how prompts would be read together."""


@dataclass(frozen=True)
class GenerationLimits:
    """Of one server, in sequences, tokens, and blocks of the cache: 64 positions of every layer."""

    max_sequences: int = 16  # that decode together
    max_blocks: int = 1_024  # of all that decode or are read
    prefill_tokens: int = 256  # of prompts between two steps
    max_waiting: int = 128
    context: int = 2_048  # positions that the model has
    prefix_cache: bool = True  # whether blocks of earlier texts are kept and found again


@dataclass(frozen=True)
class SchedulerTurn:
    """What to do now: begin this reading, read on, take a step."""

    begin: PromptReading | None = None
    read: bool = False
    step: bool = False


@dataclass
class GenerationScheduler:
    """First come, first served, higher classes before lower ones. Who gave way comes first."""

    limits: GenerationLimits
    waiting: list[Sequenced] = field(default_factory=list)
    reading: list[Sequenced] = field(default_factory=list)
    running: list[Sequenced] = field(default_factory=list)  # in the order in which they came
    preemptions: int = 0

    def __len__(self) -> int:
        return len(self.waiting) + len(self.reading) + len(self.running)

    def check(self, prompt: int, most: int) -> None:
        """Raise TooLarge for a sequence of `prompt` tokens and `most` positions that can never
        run."""
        limits = self.limits
        if most > limits.context:
            raise TooLarge(
                f"{prompt} tokens of prompt and {most - prompt} to be made are more than the "
                f"model's {limits.context}: shorten the prompt, or ask for fewer"
            )
        if -(-most // BLOCK) > limits.max_blocks:
            raise TooLarge(
                f"{prompt} tokens of prompt and {most - prompt} to be made are more than the "
                f"{limits.max_blocks * BLOCK} that the cache has room for (--max-cache-nbytes)"
            )

    def submit(self, sequences: Sequence[Sequenced]) -> None:
        """Let sequences of one request wait. Raises Busy where too many wait; an idle server
        takes any request."""
        room = self.limits.max_waiting - len(self.waiting)
        if len(sequences) > room and len(self):
            raise Busy(f"{len(self.waiting)} sequences wait", retry_after_s=1.0)
        for sequence in sequences:
            self._insert(sequence, behind=True)

    def drop(self, sequence: Sequenced) -> None:
        """Forget a sequence, whatever it is doing."""
        for queue in (self.waiting, self.reading, self.running):
            if sequence in queue:
                queue.remove(sequence)

    def give_way(self, blocks: Blocks) -> list[Sequenced]:
        """Return who has to let go of its blocks before the next turn fits; they wait again. To be
        asked until it is nobody.

        Those who are read, unless one of a lower class decodes; else the youngest of the lowest
        class. The last one stays, but where it decodes: read anew, it begins with a block.
        """
        if self.limits.max_blocks - blocks.used >= blocks.needed():
            return []
        lowest = min((s.priority for s in self.running), default=None)
        if self.reading and lowest is None and len(self.reading) == 1:
            return []
        if self.reading and (lowest is None or lowest >= max(s.priority for s in self.reading)):
            gone, self.reading = self.reading, []
        elif self.running:
            gone = [min(reversed(self.running), key=lambda s: s.priority)]
            self.running.remove(gone[0])
        else:
            return []
        for sequence in reversed(gone):
            self._insert(sequence, behind=False)
        self.preemptions += len(gone)
        return gone

    def next(self, blocks: Blocks) -> SchedulerTurn:
        """Return what to do now, and note that it is being done."""
        begin = self._admit(blocks) if self.waiting and not self.reading else None
        return SchedulerTurn(begin, bool(self.reading), bool(self.running))

    def have_read(self) -> None:
        """Note that all whose prompts were read decode from now on."""
        self.running += self.reading
        self.reading = []

    def _insert(self, sequence: Sequenced, behind: bool) -> None:
        """Put a sequence behind those of its class or before them."""
        rank = sequence.priority
        above = [i for i, s in enumerate(self.waiting) if s.priority < rank or
                 (not behind and s.priority == rank)]  # fmt: skip
        self.waiting.insert(above[0] if above else len(self.waiting), sequence)

    def _admit(self, blocks: Blocks) -> PromptReading | None:
        """Take the first that waits, and others behind it that can be read in the same piece, equal
        prompts as one; every sequence is left one block more, for its next steps. Who does not fit
        the model's columns now does when the batch has ended in another column, or is empty."""
        limits, begin = self.limits, None
        free = limits.max_blocks - blocks.used
        while self.waiting:
            rows = len(self.running) + len(self.reading) + 1
            if rows > max(1, limits.max_sequences):
                break
            found = blocks.lay_out([*self.reading, self.waiting[0]])
            if rows > 1 and (found.blocks + rows > free or not found.fits):
                break
            if len(found.rows) > 1 and found.length * len(found.rows) > limits.prefill_tokens:
                break
            self.reading.append(self.waiting.pop(0))
            begin = found
        return begin
