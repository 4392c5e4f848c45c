"""Tokens drawn from logits: greedy, by temperature, from the most probable, with penalties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbotx.serving.generation.sampling import Sampler, Sampling, log_softmax


def logits_of(*probabilities):
    return np.log(np.array(probabilities, dtype=np.float32))


def draw(sampling, logits, times=4000):
    sampler = Sampler(sampling)
    counts = np.bincount([sampler.pick(logits).token for _ in range(times)], minlength=len(logits))
    return counts / times


def test_temperature_zero_takes_the_most_probable():
    logits = logits_of(0.2, 0.5, 0.3)
    assert draw(Sampling(temperature=0), logits, 20).tolist() == [0, 1, 0]


def test_draws_follow_the_probabilities():
    logits = logits_of(0.2, 0.5, 0.3)
    found = draw(Sampling(seed=1), logits)
    assert np.abs(found - [0.2, 0.5, 0.3]).max() < 0.03
    sharper = draw(Sampling(seed=1, temperature=0.5), logits)
    assert np.abs(sharper - np.array([0.04, 0.25, 0.09]) / 0.38).max() < 0.03


def test_top_k_and_top_p_leave_out_the_improbable():
    logits = logits_of(0.1, 0.45, 0.05, 0.4)
    found = draw(Sampling(seed=1, top_k=2), logits)
    assert found[[0, 2]].tolist() == [0, 0] and abs(found[1] - 0.45 / 0.85) < 0.03
    found = draw(Sampling(seed=1, top_p=0.9), logits)
    assert found[2] == 0 and found[0] > 0
    assert draw(Sampling(seed=1, top_p=1e-9), logits, 20).tolist() == [0, 1, 0, 0]
    both = draw(Sampling(seed=1, top_k=3, top_p=0.5), logits)
    assert both[[0, 2]].tolist() == [0, 0]


def test_top_p_sorts_all_where_many_are_needed():
    logits = np.zeros(5000, dtype=np.float32)
    found = draw(Sampling(seed=1, top_p=0.5), logits, 2000)
    assert 1000 < (found > 0).sum() <= 2501


def test_a_seed_draws_the_same_again_and_none_does_not():
    logits = np.zeros(1000, dtype=np.float32)

    def draws(seed):
        sampler = Sampler(Sampling(seed=seed))
        return [sampler.pick(logits).token for _ in range(8)]

    assert draws(3) == draws(3) != draws(4)
    assert draws(None) != draws(None)


def test_penalties_and_biases():
    logits = logits_of(0.6, 0.4)
    sampler = Sampler(Sampling(temperature=0, presence_penalty=2))
    assert [sampler.pick(logits).token for _ in range(3)] == [0, 1, 0]
    sampler = Sampler(Sampling(temperature=0, frequency_penalty=0.3))
    assert [sampler.pick(logits).token for _ in range(4)] == [0, 0, 1, 0]
    sampler = Sampler(Sampling(temperature=0, logit_bias={1: 5.0, 0: -100}))
    assert sampler.pick(logits).token == 1
    assert logits.tolist() == logits_of(0.6, 0.4).tolist()  # the caller's are as they were


def test_logarithms_of_probabilities():
    logits = logits_of(0.2, 0.5, 0.3) + 7
    picked = Sampler(Sampling(temperature=0, logprobs=2)).pick(logits)
    assert picked.logprob == pytest.approx(np.log(0.5), abs=1e-6)
    assert [t for t, _ in picked.top] == [1, 2]
    assert Sampler(Sampling(logprobs=0)).pick(logits).top == []
    assert Sampler(Sampling()).pick(logits).logprob is None


@pytest.mark.parametrize("bad", [[np.nan, 0], [-np.inf, -np.inf], [np.inf, 0]])
def test_logits_that_are_no_numbers_raise(bad):
    for temperature in (0, 1):
        with pytest.raises(ValueError, match="NaN or all -inf"):
            Sampler(Sampling(temperature=temperature)).pick(np.array(bad, dtype=np.float32))


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50),
       st.floats(0.01, 50), st.floats(0.001, 1), st.integers(0, 60))  # fmt: skip
def test_any_logits_give_a_token_that_is_allowed(logits, temperature, top_p, top_k):
    row = np.array(logits, dtype=np.float32)
    sampling = Sampling(temperature, top_p, top_k, seed=0)
    token = Sampler(sampling).pick(row).token
    assert 0 <= token < len(row)
    if top_k:
        assert (row > row[token]).sum() < top_k
    assert np.exp(log_softmax(row)).sum() == pytest.approx(1)
