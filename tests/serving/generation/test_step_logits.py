"""Tokens found for all rows of a step at once."""

from __future__ import annotations

import math

import pytest
import torch

from turbotx.serving.generation.sampling import Sampler, Sampling, check_logit
from turbotx.serving.generation.step_logits import StepLogits, find_best

INFINITY, NAN = math.inf, math.nan
ROWS = [
    [0.5, 2.0, 2.0, -1.0],  # the first of equals
    [-INFINITY, -3.0, -INFINITY, -4.0],
    [1.0, NAN, 3.0, 2.0],
    [-INFINITY] * 4,
    [1.0, INFINITY, 0.0, 0.0],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_device_finds_what_the_host_finds(dtype):
    logits = torch.tensor(ROWS, dtype=dtype)
    found = StepLogits(logits, {"a": 0})
    found.wait()
    tokens, highest = find_best(logits)
    for place in range(len(ROWS)):
        token, logit = found.best(place)
        assert token == int(tokens[place])
        assert logit == float(highest[place]) or math.isnan(logit) == math.isnan(highest[place])


def test_the_best_is_what_the_sampler_takes_of_the_row():
    found, greedy = StepLogits(torch.tensor(ROWS), {}), Sampler(Sampling(temperature=0))
    for place in (0, 1):
        assert greedy.pick(found.row(place)).token == found.best(place)[0] == 1
    for place in (2, 3, 4):
        for refused in (
            lambda k: greedy.pick(found.row(k)), lambda k: check_logit(found.best(k)[1]),
        ):  # fmt: skip
            with pytest.raises(ValueError, match="NaN or all -inf"):
                refused(place)


def test_only_plain_greedy_sampling_needs_no_more_than_the_best():
    assert Sampler(Sampling(temperature=0, top_k=5, top_p=0.5, seed=1)).takes_best
    for more in (
        {"temperature": 0.1}, {"logprobs": 0}, {"logit_bias": {1: 1.0}},
        {"presence_penalty": 0.5}, {"frequency_penalty": -0.5},
    ):  # fmt: skip
        assert not Sampler(Sampling(**{"temperature": 0, **more})).takes_best
