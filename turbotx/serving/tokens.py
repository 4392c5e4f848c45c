"""Tokens: converts text to token ids.

In: a string, or a pair for models of pairs. Out: a ``TokenRow``, truncated to the model's length or
refused. Thread-safe. A single text goes through ``encode_batch`` too, since that releases the GIL
and ``encode`` does not::

    TextTokenizer(tokenizer, 512).encode("hello world")     # TokenRow(ids=(101, 7592, 2088, 102))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from turbotx.serving.refusals import BadInput, TooLarge
from turbotx.serving.schemas import Token

CHARACTERS_PER_TOKEN = 24  # an upper bound of any text's average


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One sequence of token ids."""

    ids: tuple[int, ...]
    types: tuple[int, ...] | None = None  # segment ids; None: all zero

    def __len__(self) -> int:
        return len(self.ids)


class TextTokenizer:
    """A Hugging Face tokenizer with its padding and truncation disabled.

    vocabulary: bound of the ids that clients may send. pad_id: the padding token. gives_types:
    whether rows have segment ids.
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
        """A valid token id, for synthetic rows in measurements."""
        return min(100, self.vocabulary - 1)

    def encode(
        self, text: str | tuple[str, str], *, truncate: bool = False, keep_end: bool = False
    ) -> TokenRow:
        """Return the tokens of a text or pair, with special tokens.

        Raises TooLarge above the model's length unless `truncate`, BadInput for an empty text.
        Texts far above the length are truncated or refused before tokenization, to bound its cost.
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
        """Return a row of token ids sent by a client. Raises BadInput, TooLarge."""
        if not ids:
            raise BadInput("an input of token ids is empty")
        if len(ids) > self.max_length:
            raise TooLarge(f"an input has {len(ids)} tokens, the model takes {self.max_length}")
        self._check_range(ids)
        return TokenRow(tuple(ids))

    def texts_of(self, rows: Sequence[Sequence[int]], skip_special: bool) -> list[str]:
        """Return the text of each row of ids. skip_special: leave special tokens out. Raises
        BadInput for ids outside the vocabulary."""
        for ids in rows:
            self._check_range(ids)
        found: list[str] = self.tokenizer.decode_batch(rows, skip_special_tokens=skip_special)
        return found

    def describe(self, text: str, most: int, *, add_special_tokens: bool = True) -> list[Token]:
        """Return each token with id, text and offsets, for ``/tokenize``, without truncation.

        Raises TooLarge above `most` tokens: the description is far longer than the text.
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
        """Return the encoding of a text or pair without truncation; raise BadInput for invalid
        Unicode."""
        try:
            pair = first if second is None else (first, second)
            return self.tokenizer.encode_batch([pair], add_special_tokens=special)[0]
        except (TypeError, UnicodeError) as error:  # lone surrogates, which JSON can carry
            raise BadInput("an input is not valid Unicode text") from error

    def _check_range(self, ids: Sequence[int]) -> None:
        if ids and (min(ids) < 0 or max(ids) >= self.vocabulary):
            raise BadInput(f"token ids must lie in 0 to {self.vocabulary - 1}")

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
        """Truncate an encoding but keep its special tokens: encode without, truncate, add them."""
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
    """Return the tokens to keep of each text of a pair: the longer is truncated first, as in
    tokenizers' "longest_first"."""
    short, long = sorted((first, second))
    long = min(long, max(short, room - short))
    if short + long > room:
        short, long = room // 2, room - room // 2
    return (long, short) if first > second else (short, long)
