"""Eager calls: calls that PyTorch runs instead of a program, and the warnings about them.

In: a call, and why no program serves it. Out: the model's own output, one warning per reason, and a
count in `stats()`::

    engine.run_eager((), {"input_ids": ids})
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from turbotx.capture.composition import calls_forward, turbotx_disabled
from turbotx.capture.decisions import Outcomes, describe_last
from turbotx.errors import DecisionWarning, EagerWarning


class EagerCalls:
    """The part of an engine that does not run programs: eager calls, warnings, counts."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.forward_is_models = True
        """False if a subclass of an optimized class has a `forward` of its own around it."""
        self.eager_calls = 0
        self.decided_otherwise = 0
        """Number of runs discarded because a decision came out differently, see `Decisions`."""
        self._told: set[str] = set()

    @property
    def calls_forward(self) -> bool:
        """Whether programs cover `forward` alone, and hooks run around them: unless a class has a
        `__call__` of its own, now."""
        return self.forward_is_models and calls_forward(self.model)

    def run_eager(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a call in eager PyTorch, without turbotx and without gradients; return its output."""
        with turbotx_disabled(), torch.no_grad():
            return (self.model.forward if self.calls_forward else self.model)(*args, **kwargs)

    def count_eager(self, why: str) -> None:
        """Count a call that runs in PyTorch; warn once per reason."""
        self.eager_calls += 1
        self._tell(why, why, EagerWarning, stacklevel=5)

    def warn_rerun(self, outcomes: Outcomes) -> None:
        """Warn, once per source line, that a decision (the last of `outcomes`) came out differently
        than the first program assumed, so that the call ran twice."""
        text = (
            f"{describe_last(outcomes)}, and the call ran again on that way: a call that decides "
            "otherwise than those before it takes the time of two"
        )
        self._tell(outcomes[-1][0], text, DecisionWarning, stacklevel=6)

    def _tell(self, reason: str, text: str, category: type[Warning], stacklevel: int) -> None:
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(text, category, stacklevel)
