"""Scheduler of generation: whose prompt is read next, who decodes, who has to give way.

In: sequences that arrive, and how much of the cache is taken. Out: one turn at a time, a piece of
prompts to read and whether the running sequences take a step; it has no clock, no model and no
HTTP in it::

    scheduler.submit(sequence); scheduler.next(slots)  ->  SchedulerTurn(read=[...], step=True)

Iterations are scheduled as in Orca (Yu et al., OSDI'22, section 3.1), prompts in pieces beside the
steps as in Sarathi-Serve (Agrawal et al., OSDI'24, section 4): no step waits longer than one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from turbotx.serving.generation.slots import BLOCK, Slots, held_positions
from turbotx.serving.refusals import Busy, TooLarge


class Sequenced(Protocol):
    """What the scheduler knows of a sequence."""

    def __hash__(self) -> int:
        """Two are equal only if they are one."""

    @property
    def priority(self) -> int:
        """Its class: -1, 0 or 1, the highest first."""

    @property
    def prompt(self) -> Sequence[int]:
        """The tokens to be read before the next one is made: after it gave way, also its own."""

    @property
    def most(self) -> int:
        """Positions that it takes at its end."""


@dataclass(frozen=True)
class GenerationLimits:
    """Of one server, in sequences and positions of the cache."""

    max_sequences: int = 16  # that decode together
    max_positions: int = 65_536  # of the cache, of all that decode or are read
    prefill_tokens: int = 256  # of prompts between two steps
    max_waiting: int = 128
    context: int = 2_048  # positions that the model has


@dataclass(frozen=True)
class SchedulerTurn:
    """What to do now: begin to read these together, read on, take a step."""

    begin: Sequence[Sequenced] = ()
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
        if held_positions(1, most) > limits.max_positions:
            raise TooLarge(
                f"{prompt} tokens of prompt and {most - prompt} to be made are more than the "
                f"{limits.max_positions} that the cache has room for (--max-cache-nbytes)"
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

    def give_way(self, slots: Slots) -> list[Sequenced]:
        """Take sequences off the batch until its next step fits, the youngest of the lowest class
        first; they wait again. The last one stays."""
        gone: list[Sequenced] = []
        while len(self.running) > 1 and (
            held_positions(len(self.running), slots.length + 1) > self.limits.max_positions
        ):
            gone.append(self.preempt())
        return gone

    def preempt(self) -> Sequenced:
        """Take the youngest sequence of the lowest class off the batch; it waits again."""
        youngest = min(reversed(self.running), key=lambda s: s.priority)
        self.running.remove(youngest)
        self._insert(youngest, behind=False)
        self.preemptions += 1
        return youngest

    def next(self, slots: Slots) -> SchedulerTurn:
        """Return what to do now, and note that it is being done."""
        begin: list[Sequenced] = []
        if not self.reading:
            begin = self._admit(slots)
            self.reading = begin
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

    def _admit(self, slots: Slots) -> list[Sequenced]:
        """Take the first that waits, and others behind it that can be read in the same piece."""
        limits = self.limits
        taken: list[Sequenced] = []
        longest = slots.length
        while self.waiting:
            first = self.waiting[0]
            length = len(first.prompt)
            rows = len(self.running) + len(taken) + 1
            alone = not self.running and not taken
            widest = max([length, *(len(s.prompt) for s in taken)])
            held = held_positions(rows, max(longest, widest) + BLOCK)  # some steps ahead
            if not alone and (rows > limits.max_sequences or held > limits.max_positions):
                break
            if taken and widest * (len(taken) + 1) > limits.prefill_tokens:
                break
            taken.append(self.waiting.pop(0))
        return taken
