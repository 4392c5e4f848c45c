"""Step logits: what one call of the model says of each row's next token.

In: logits (rows, vocabulary) on the model's device, perhaps still being computed, and whose the
rows are. Out: the most probable token of every row, found there for all rows at once; a whole row
only for those who ask for it::

    found = StepLogits(logits, {sequence: 0})
    found.wait(); found.best(0)      # (318, -1.25): all that greedy sampling needs
    found.row(0)                     # float32 (vocabulary,)
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

Logits = NDArray[np.float32]


class StepLogits:
    """Valid until the model's next call."""

    def __init__(self, logits: torch.Tensor, places: Mapping[Hashable, int]) -> None:
        """places: the row of each sequence; none while there is more of the prompts to read."""
        self._logits, self.places = logits, places
        self._found: torch.Tensor | None = None
        if logits.device.type != "cpu":  # queued behind the call
            self._found = find_best(logits)

    def wait(self) -> None:
        """Wait until the logits are computed."""
        if self.places or self._found is not None:
            self._best  # noqa: B018 - computed once

    def best(self, place: int) -> tuple[int, float]:
        """Return a row's most probable token, the first of equals, and its logit: NaN if the row
        has any."""
        tokens, logits = self._best
        return tokens[place], logits[place]

    def row(self, place: int) -> Logits:
        """Return a row's logits, float32 (vocabulary,)."""
        row: Logits = self._rows[place]
        return row

    @cached_property
    def _rows(self) -> Logits:
        rows: Logits = self._logits.float().cpu().numpy()
        return rows

    @cached_property
    def _best(self) -> tuple[list[int], list[float]]:
        if self._found is not None:
            tokens, logits = self._found.cpu().numpy()
            return tokens.astype(np.int64).tolist(), logits.tolist()
        places = self._rows.argmax(axis=1)  # NumPy's is several times as fast as PyTorch's
        return places.tolist(), self._rows[np.arange(len(places)), places].tolist()


def find_best(logits: torch.Tensor) -> torch.Tensor:
    """Return each row's most probable token and its logit where the logits are, float64 (2, rows),
    so that one copy brings both; float64 has every token exactly."""
    best, tokens = logits.max(-1)
    return torch.stack([tokens.double(), best.double()])
