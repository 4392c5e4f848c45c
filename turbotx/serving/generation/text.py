r"""Text stream: decodes tokens to whole characters; holds back text that may begin a stop string.

In: tokens one by one, and the stop strings. Out: the text that can be sent; a stop string and all
after it are never sent::

    text = TextStream(tokenizer, stops=["\n\n"]); text.push(318)      # ' is'
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextStream:
    """Decodes one sequence; `stopped` is set after a stop string."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        """tokenizer: a `tokenizers.Tokenizer`."""
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._stops = tokenizer, [s for s in stops if s]
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._held, self._given = "", ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add the next token; return the text that can be sent now, possibly empty."""
        self._tokens.append(token)
        return self._hand_out(self._stream.step(self._tokenizer, token) or "", last=False)

    def finish(self) -> str:
        """Return the text held back, after the last token.

        Incomplete characters become U+FFFD.
        """
        if self.stopped:
            return ""
        whole: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        known = self._given + self._held
        return self._hand_out(whole[len(known) :] if whole.startswith(known) else "", last=True)

    def _hand_out(self, text: str, last: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        places = [p for p in map(self._held.find, self._stops) if p >= 0]
        if places:
            self.stopped = True
            certain = self._held[: min(places)]
        elif last:
            certain = self._held
        else:
            certain = self._held[: len(self._held) - self._begun()]
        self._held = self._held[len(certain) :]
        self._given += certain
        return certain

    def _begun(self) -> int:
        """Return the length of the longest suffix of the held text that is a prefix of a stop
        string."""
        longest = max((len(s) - 1 for s in self._stops), default=0)
        for count in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-count:]) for s in self._stops):
                return count
        return 0
