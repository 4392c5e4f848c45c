"""Text to token ids.

In: a string, or a pair of them for models that read pairs. Out: a ``TokenRow``, cut to the model's
length or refused. Thread-safe: called from a pool, so ``encode_batch`` is used also for one text,
for it releases the interpreter lock and ``encode`` does not::

    TextTokenizer(tokenizer, 512).encode("hello world")     # TokenRow(ids=(101, 7592, 2088, 102))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from turbotx.serving.refusals import BadInput, TooLarge
from turbotx.serving.schemas import Token

CHARACTERS_PER_TOKEN = 24  # more than any tokenizer needs on average over a whole text


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One sequence as the model reads it."""

    ids: tuple[int, ...]
    types: tuple[int, ...] | None = None  # segment ids; None: all zero

    def __len__(self) -> int:
        return len(self.ids)


class TextTokenizer:
    """A Hugging Face tokenizer without padding or truncation of its own.

    ``vocabulary`` bounds the ids that a client may send; ``pad_id`` and ``gives_types`` (whether
    rows come with segment ids) are what the tokenizer's files say.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        vocabulary: int | None = None,
        *,
        pad_id: int | None = None,
        gives_types: bool = True,
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.vocabulary = vocabulary or tokenizer.get_vocab_size()
        self.pad_id, self.gives_types = pad_id, gives_types

    @property
    def any_token(self) -> int:
        """Return a valid token id for synthetic texts used in timing."""
        return min(100, self.vocabulary - 1)

    def encode(
        self, text: str | tuple[str, str], *, truncate: bool = False, keep_end: bool = False
    ) -> TokenRow:
        """Encode with special tokens. Raises TooLarge, unless ``truncate``; BadInput when empty.

        A text that is far too long for the model is cut before it is tokenised, or refused
        without being tokenised: its cost must not grow with what the client sends.
        """
        first, second = (text, None) if isinstance(text, str) else text
        if not first or second == "":
            raise BadInput("an input is empty: every text needs at least one character")
        limit = self.max_length * CHARACTERS_PER_TOKEN
        first = self._cut(first, limit, truncate, keep_end)
        second = None if second is None else self._cut(second, limit, truncate, keep_end)
        encoding = self.encode_text(first, second)
        if len(encoding.ids) > self.max_length:
            if not truncate:
                raise TooLarge(
                    f"an input has {len(encoding.ids)} tokens, the model takes "
                    f"{self.max_length}: shorten it, or send truncate=true"
                )
            encoding = self._shorten(first, second, encoding, keep_end)
        types = tuple(encoding.type_ids)
        return TokenRow(tuple(encoding.ids), types if any(types) else None)

    def check_ids(self, ids: list[int]) -> TokenRow:
        """Token ids that a client sent. Raises BadInput, TooLarge."""
        if not ids:
            raise BadInput("an input of token ids is empty")
        if len(ids) > self.max_length:
            raise TooLarge(f"an input has {len(ids)} tokens, the model takes {self.max_length}")
        if min(ids) < 0 or max(ids) >= self.vocabulary:
            raise BadInput(f"token ids must lie in 0 to {self.vocabulary - 1}")
        return TokenRow(tuple(ids))

    def texts_of(self, rows: Sequence[Sequence[int]], skip_special: bool) -> list[str]:
        """Return the text of each row of ids, with or without its special tokens. Raises
        BadInput."""
        for ids in rows:
            if ids and (min(ids) < 0 or max(ids) >= self.vocabulary):
                raise BadInput(f"token ids must lie in 0 to {self.vocabulary - 1}")
        found: list[str] = self.tokenizer.decode_batch(rows, skip_special_tokens=skip_special)
        return found

    def describe(self, text: str, most: int, *, add_special_tokens: bool = True) -> list[Token]:
        """Each token with its id, text and place, for ``/tokenize``; never truncated.

        Raises TooLarge beyond ``most`` tokens: what describes them is far longer than the text.
        """
        refusal = f"the texts have more than {most} tokens: send them in several requests"
        if len(text) > most * CHARACTERS_PER_TOKEN:
            raise TooLarge(refusal)
        encoding = self.encode_text(text, None, add_special_tokens)
        if len(encoding) > most:
            raise TooLarge(refusal)
        facts = zip(
            encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets,
            strict=True,
        )  # fmt: skip
        return [
            Token(token, piece, bool(special), *((None, None) if special else place))
            for token, piece, special, place in facts
        ]

    def encode_text(self, first: str, second: str | None, special: bool = True) -> Any:
        """Return the tokenizer's encoding of a text or a pair, uncut; raise BadInput for text
        that is not valid Unicode."""
        try:
            pair = first if second is None else (first, second)
            return self.tokenizer.encode_batch([pair], add_special_tokens=special)[0]
        except (TypeError, UnicodeError) as error:  # lone surrogates, which JSON can carry
            raise BadInput("an input is not valid Unicode text") from error

    def _cut(self, text: str, limit: int, truncate: bool, keep_end: bool) -> str:
        if len(text) <= limit:
            return text
        if not truncate:
            raise TooLarge(
                f"an input has {len(text)} characters, far more than the model's "
                f"{self.max_length} tokens: shorten it, or send truncate=true"
            )
        return text[-limit:] if keep_end else text[:limit]

    def _shorten(self, first: str, second: str | None, encoding: Any, keep_end: bool) -> Any:
        """Keep the special tokens: encode without them, cut, put them round what is left."""
        a = self.encode_text(first, None, False)
        b = None if second is None else self.encode_text(second, None, False)
        room = self.max_length - (len(encoding.ids) - len(a.ids) - (len(b.ids) if b else 0))
        side = "left" if keep_end else "right"
        if b is None:
            a.truncate(room, direction=side)
        else:
            first_length, second_length = longest_first(len(a.ids), len(b.ids), room)
            a.truncate(first_length, direction=side)
            b.truncate(second_length, direction=side)
        return self.tokenizer.post_process(a, b)


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How much of a pair is kept, in tokens: the longer is cut first, as tokenizers does it."""
    short, long = sorted((first, second))
    long = min(long, max(short, room - short))
    if short + long > room:
        short, long = room // 2, room - room // 2
    return (long, short) if first > second else (short, long)
