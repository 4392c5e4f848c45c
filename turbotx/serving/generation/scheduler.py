"""Generation scheduler: selects prompts to prefill, sequences to decode, and whom to preempt.

In: arriving sequences, and the number of used cache blocks. Out: one turn at a time: a piece of
prompts to prefill and whether running sequences take a step. It has no clock, model or HTTP::

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
from turbotx.serving.settings import SettingsError


class Sequenced(Prompted, Protocol):
    """The part of a sequence that the scheduler needs."""

    @property
    def priority(self) -> int:
        """Priority -1, 0 or 1; the highest is first."""


class Blocks(Protocol):
    """The cache as the scheduler sees it, counted in blocks per layer."""

    @property
    def used(self) -> int:
        """Blocks used by sequences; all others can be evicted."""

    def needed(self) -> int:
        """Return the most blocks that the next turn allocates."""

    def lay_out(self, sequences: Sequence[Prompted]) -> PromptReading:
        """Return the layout of a joint prefill of these prompts."""


@dataclass(frozen=True)
class GenerationLimits:
    """Limits of one server, in sequences, tokens, and cache blocks of 64 positions per layer."""

    max_sequences: int = 16  # decoding together
    max_blocks: int = 1_024  # of decoding and prefilling sequences
    prefill_tokens: int = 256  # prompt tokens between two decoding steps
    max_waiting: int = 128
    context: int = 2_048  # the model's positions
    prefix_cache: bool = True  # reuse the blocks of earlier texts

    def __post_init__(self) -> None:
        for name in ("max_sequences", "prefill_tokens", "max_waiting"):
            if getattr(self, name) <= 0:
                raise SettingsError(f"{name} must be above zero, got {getattr(self, name)}")


@dataclass(frozen=True)
class SchedulerTurn:
    """One turn: start this prefill, continue the prefill, take a decoding step."""

    begin: PromptReading | None = None
    read: bool = False
    step: bool = False


@dataclass
class GenerationScheduler:
    """First come, first served by priority; preempted sequences go first within theirs."""

    limits: GenerationLimits
    waiting: list[Sequenced] = field(default_factory=list)
    reading: list[Sequenced] = field(default_factory=list)
    running: list[Sequenced] = field(default_factory=list)  # in order of arrival
    preemptions: int = 0

    def __len__(self) -> int:
        return len(self.waiting) + len(self.reading) + len(self.running)

    def check(self, prompt: int, most: int) -> None:
        """Raise TooLarge for a sequence that can never run.

        prompt: its tokens; most: positions, generated tokens included."""
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
        """Queue the sequences of one request. Raises Busy if too many wait; an idle server accepts
        any request."""
        room = self.limits.max_waiting - len(self.waiting)
        if len(sequences) > room and len(self):
            raise Busy(f"{len(self.waiting)} sequences wait: retry later", retry_after_s=1.0)
        for sequence in sequences:
            self._insert(sequence, behind=True)

    def drop(self, sequence: Sequenced) -> None:
        """Remove a sequence in any state."""
        for queue in (self.waiting, self.reading, self.running):
            if sequence in queue:
                queue.remove(sequence)

    def give_way(self, blocks: Blocks) -> list[Sequenced]:
        """Return sequences to preempt so that the next turn fits; they are queued again. Call it
        until it returns none.

        Prefilling sequences are preempted first unless one of a lower priority decodes, then the
        youngest of the lowest priority. A single prefilling sequence is not preempted; a single
        decoding one is, since prefilled again it starts at a block boundary.
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
        """Return the next turn and record it as started."""
        begin = self._admit(blocks) if self.waiting and not self.reading else None
        return SchedulerTurn(begin, bool(self.reading), bool(self.running))

    def have_read(self) -> None:
        """Record the end of a prefill: its sequences decode from now on."""
        self.running += self.reading
        self.reading = []

    def _insert(self, sequence: Sequenced, behind: bool) -> None:
        """Insert a sequence after (`behind`) or before the waiting ones of its priority."""
        rank = sequence.priority
        above = [i for i, s in enumerate(self.waiting) if s.priority < rank or
                 (not behind and s.priority == rank)]  # fmt: skip
        self.waiting.insert(above[0] if above else len(self.waiting), sequence)

    def _admit(self, blocks: Blocks) -> PromptReading | None:
        """Return a prefill of the first waiting sequence and further ones that fit into the same
        piece, equal prompts once. One block per sequence is reserved for its next steps. A sequence
        that does not fit the model's columns now does once the batch has ended in another column,
        or is empty."""
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
