"""Sequence: one text being generated, with its prompt, tokens and end conditions.

In: a request's options; logits, one row per step. Out: pieces, passed to a callback::

    sequence.take(logits)     # Piece(text=" is", token=318, ...)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from turbotx.serving.generation.sampling import Logits, Picked, Sampler, Sampling
from turbotx.serving.generation.text import TextStream

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Asked:
    """Options of one text.

    max_tokens: most generated tokens. ends: end-of-text tokens, not part of the text. stops:
    strings that end it."""

    max_tokens: int
    ends: frozenset[int] = frozenset()
    stops: Sequence[str] = ()
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Piece:
    """The result of one step.

    picked: None if the piece has only text held back before. cached: prompt tokens whose keys and
    values were reused."""

    text: str
    picked: Picked | None
    finish: Finish | None = None
    cached: int = 0


class GeneratedSequence:
    """A sequence of the worker; `tell` is called on its thread with each piece or an error.

    Sequences are compared by identity.
    """

    def __init__(
        self, ids: Sequence[int], asked: Asked, tokenizer: Any,
        tell: Callable[[Piece | Exception], None], priority: int = 0,
    ) -> None:  # fmt: skip
        self.ids, self.asked, self.tell, self.priority = list(ids), asked, tell, priority
        self.tokens: list[int] = []
        self.finished = False
        self._cached: int | None = None
        self._sampler = Sampler(asked.sampling)
        self._text = TextStream(tokenizer, asked.stops)

    @property
    def prompt(self) -> Sequence[int]:
        """The tokens to prefill; after a preemption also the generated ones."""
        return [*self.ids, *self.tokens]

    @property
    def most(self) -> int:
        """Most positions it can have."""
        return len(self.ids) + self.asked.max_tokens

    def note_cached(self, tokens: int) -> None:
        """Record the number of reused prompt tokens at the first prefill; later ones do not
        count."""
        if self._cached is None:
            self._cached = tokens

    def take(self, logits: Logits) -> None:
        """Sample the next token and pass it to `tell`; `finished` is set after the last.

        logits: float (vocabulary,). Raises ValueError if they are NaN.
        """
        picked = self._sampler.pick(logits)
        if picked.token in self.asked.ends:
            self._tell("", None, "stop")
            return
        self.tokens.append(picked.token)
        text = self._text.push(picked.token)
        if self._text.stopped:
            self._tell(text, picked, "stop")
        elif len(self.tokens) >= self.asked.max_tokens:
            self._tell(text + self._text.finish(), picked, "length")
        else:
            self.tell(Piece(text, picked, None, self._cached or 0))

    def fail(self, error: Exception) -> None:
        """End the sequence with an error."""
        self.finished = True
        self.tell(error)

    def _tell(self, text: str, picked: Picked | None, finish: Finish) -> None:
        self.finished = True
        text = text if picked else self._text.finish()
        self.tell(Piece(text, picked, finish, self._cached or 0))
