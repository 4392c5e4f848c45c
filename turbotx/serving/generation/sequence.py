"""Sequence: one text that is being made: its prompt, its tokens, why it ends.

In: what a request asks for; logits, one row at a time. Out: pieces for whoever listens::

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
    """What a request says of each of its texts. max_tokens: made at most; ends: tokens that end a
    text, and are no part of it; stops: strings that do."""

    max_tokens: int
    ends: frozenset[int] = frozenset()
    stops: Sequence[str] = ()
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Piece:
    """What one step added to a text. picked: None where only held back text is handed out. cached:
    tokens of the text's prompt that were not read, since their keys and values were known."""

    text: str
    picked: Picked | None
    finish: Finish | None = None
    cached: int = 0


class GeneratedSequence:
    """Owned by the worker's thread; `tell` is called there with each piece or an error.

    Two sequences are equal only if they are one.
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
        """The tokens to be read before the next one is made: after it gave way, also its own."""
        return [*self.ids, *self.tokens]

    @property
    def most(self) -> int:
        """Positions that it takes at its end."""
        return len(self.ids) + self.asked.max_tokens

    def note_cached(self, tokens: int) -> None:
        """Note how much of the prompt was not read; when it is read again, that does not count."""
        if self._cached is None:
            self._cached = tokens

    def take(self, logits: Logits) -> None:
        """Draw the next token and tell of it; `finished` says whether it is the last.

        logits: float, (vocabulary,). Raises ValueError for logits that are no numbers.
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
        """End it by an error."""
        self.finished = True
        self.tell(error)

    def _tell(self, text: str, picked: Picked | None, finish: Finish) -> None:
        self.finished = True
        text = text if picked else self._text.finish()
        self.tell(Piece(text, picked, finish, self._cached or 0))
