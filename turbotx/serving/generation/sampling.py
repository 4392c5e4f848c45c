"""Sampling: draws the next token from a row of logits.

In: float32 logits over the vocabulary, sampling options, the tokens so far. Out: a token, its log
probability, and those of the most probable tokens::

    Sampler(Sampling(temperature=0.7, seed=1)).pick(logits).token      # 318
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from turbotx.serving.generation.step_logits import Logits

MANY = 1_024
"""Tokens that are sorted first to find those of `top_p`; all are where these do not reach it."""


@dataclass(frozen=True)
class Sampling:
    """Sampling options of a request.

    temperature: 0 for greedy. top_k: 0 for all. seed: None for a random one. logprobs: number of
    most probable tokens to return, None for no log probabilities. Penalties are OpenAI's,
    subtracted from logits of generated tokens: presence_penalty once, frequency_penalty per
    occurrence.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Picked:
    """A token, its natural log probability at temperature 1, and (token, log probability) of the
    most probable ones in descending order."""

    token: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


class Sampler:
    """Samples the tokens of one sequence."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._made: dict[int, int] = {}

    @property
    def takes_best(self) -> bool:
        """Whether the next token is the most probable one of the model's own logits, and nothing
        else is asked for."""
        sampling = self._sampling
        adjusted = sampling.logit_bias or sampling.presence_penalty or sampling.frequency_penalty
        return sampling.temperature == 0 and sampling.logprobs is None and not adjusted

    def pick(self, logits: Logits) -> Picked:
        """Sample the next token from (vocabulary,) logits.

        Raises ValueError if they contain NaN or only -inf.
        """
        sampling = self._sampling
        scores = self._adjust(logits)
        token = int(scores.argmax())  # the first NaN, if there is any
        check_logit(scores[token])
        if sampling.temperature:
            token = self._draw(scores)
        self._made[token] = self._made.get(token, 0) + 1
        if sampling.logprobs is None:
            return Picked(token)
        logs = log_softmax(scores)
        best = _largest(logs, sampling.logprobs)
        return Picked(token, float(logs[token]), [(int(i), float(logs[i])) for i in best])

    def _adjust(self, logits: Logits) -> Logits:
        """Return the logits with biases and penalties; the same array if there are none."""
        sampling = self._sampling
        penalised = self._made and (sampling.presence_penalty or sampling.frequency_penalty)
        if not sampling.logit_bias and not penalised:
            return logits
        scores = logits.copy()
        for token, bias in sampling.logit_bias.items():
            scores[token] += bias
        if penalised:
            tokens = np.fromiter(self._made, np.int64, len(self._made))
            times = np.fromiter(self._made.values(), np.float32, len(self._made))
            scores[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * times
        return scores

    def _draw(self, scores: Logits) -> int:
        sampling = self._sampling
        scaled = (scores - scores.max()).astype(np.float64) / sampling.temperature
        tokens = None
        if 0 < sampling.top_k < len(scaled):
            tokens = _largest(scaled, sampling.top_k)
            scaled = scaled[tokens]
        weights = np.exp(scaled)
        if sampling.top_p < 1:
            kept = _nucleus(weights, sampling.top_p)
            weights = weights[kept]
            tokens = kept if tokens is None else tokens[kept]
        cumulative = np.cumsum(weights)
        drawn = self._random.random() * cumulative[-1]
        place = min(int(np.searchsorted(cumulative, drawn, side="right")), len(weights) - 1)
        return place if tokens is None else int(tokens[place])


def check_logit(highest: float) -> None:
    """Raise ValueError if the highest of a row's logits is NaN or infinite."""
    if not math.isfinite(highest):
        raise ValueError("the model's logits are NaN or all -inf")


def log_softmax(scores: Logits) -> NDArray[np.float64]:
    """Return natural log probabilities, float64 (vocabulary,)."""
    shifted = scores.astype(np.float64) - scores.max()
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def _largest(values: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """Return the indices of the `count` largest values, in descending order."""
    count = min(count, len(values))
    if count == 0:
        return np.empty(0, np.int64)
    places = np.argpartition(values, -count)[-count:]
    return places[np.argsort(-values[places], kind="stable")].astype(np.int64)


def _nucleus(weights: NDArray[np.float64], share: float) -> NDArray[np.int64]:
    """Return the smallest set of most probable indices with at least `share` of the total weight
    (top-p, Holtzman et al. 2020, section 3.1)."""
    wanted = share * weights.sum()
    for count in (MANY, len(weights)):
        order = _largest(weights, count)
        cumulative = np.cumsum(weights[order])
        if cumulative[-1] >= wanted or count >= len(weights):
            break
    return order[: int(np.searchsorted(cumulative, wanted)) + 1]
