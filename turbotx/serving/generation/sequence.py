"""Sequence: one text being generated, with its prompt, tokens and end conditions.

In: a request's options; logits, one row per step. Out: a token at once, since the next step needs
it; the text that it adds when there is time for it::

    sequence.choose(logits, place=0); sequence.tokens[-1]      # 318
    sequence.piece()                                           # Piece(text=" is", ...)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from turbotx.serving.generation.sampling import Picked, Sampler, Sampling, check_logit
from turbotx.serving.generation.step_logits import StepLogits
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
    """A sequence of the worker; `tell` is called, on the event loop, with each piece or an error.

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
        self._chosen: tuple[Picked | None, str | None, Finish | None] = (None, "", None)

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

    def choose(self, logits: StepLogits, place: int) -> None:
        """Sample the next token from a row of the logits; `finished` is set after the last.

        Raises ValueError if they are NaN.
        """
        if self._sampler.takes_best:
            token, highest = logits.best(place)
            check_logit(highest)
            picked = Picked(token)
        else:
            picked = self._sampler.pick(logits.row(place))
        finish: Finish | None = None
        if picked.token in self.asked.ends:
            self._chosen, self.finished = (None, None, "stop"), True
            return
        self.tokens.append(picked.token)
        text = None
        if self.asked.stops:  # whether the text goes on is in the text
            text = self._text.push(picked.token)
        if self._text.stopped:
            finish = "stop"
        elif len(self.tokens) >= self.asked.max_tokens:
            finish = "length"
        self._chosen, self.finished = (picked, text, finish), finish is not None

    def piece(self) -> Piece:
        """Return what the token chosen last adds to the text; once for each token."""
        picked, text, finish = self._chosen
        if picked is None:
            text = self._text.finish()
        elif text is None:
            text = self._text.push(picked.token)
        if finish == "length":
            text += self._text.finish()
        return Piece(text, picked, finish, self._cached or 0)
