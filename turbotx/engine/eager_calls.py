"""Eager calls: those that PyTorch runs instead of a program, and what is said of them.

In: a call, and why no program answers it. Out: what the model itself makes of it, one warning a
reason, and a count in `stats()`::

    engine.run_plainly((), {"input_ids": ids})
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from turbotx.capture.composition import calls_forward, left_alone
from turbotx.capture.decisions import Outcomes, describe_last
from turbotx.errors import DecisionWarning, EagerWarning


class EagerCalls:
    """What of an engine does not run programs."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.calls_forward = model, calls_forward(model)
        self.eager_calls = 0
        self.decided_otherwise = 0
        """Runs that a decision by a tensor's values made vain, see `Decisions`."""
        self._told: set[str] = set()

    def run_plainly(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what the model itself makes of a call, without turbotx and gradients."""
        with left_alone(), torch.no_grad():
            return (self.model.forward if self.calls_forward else self.model)(*args, **kwargs)

    def count_eager(self, why: str) -> None:
        """Count a call that runs in PyTorch; warn of it, once a reason."""
        self.eager_calls += 1
        self._tell(why, why, EagerWarning, stacklevel=5)

    def tell_otherwise(self, outcomes: Outcomes) -> None:
        """Warn, once a line, that a decision came out otherwise than the program assumed that ran
        first, the last one of `outcomes`."""
        text = (
            f"{describe_last(outcomes)}, and the call ran again on that way: a call that decides "
            "otherwise than those before it takes the time of two"
        )
        self._tell(outcomes[-1][0], text, DecisionWarning, stacklevel=6)

    def _tell(self, reason: str, text: str, category: type[Warning], stacklevel: int) -> None:
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(text, category, stacklevel)
