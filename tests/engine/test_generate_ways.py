"""What `generate` can do besides choosing tokens: long prompts, streamers, assistants.

In: tiny decoders of ten families. Out: the tokens that eager gives, through turbotx alone.
"""

from __future__ import annotations

import pytest
import torch

import turbotx
from tests.engine.decoders import (
    FAMILIES,
    VOCABULARY,
    WITH_ENCODER,
    generate,
    make,
    nothing_runs_in_pytorch,  # noqa: F401 - a fixture
    prompt,
)

transformers = pytest.importorskip("transformers")

LONG = 300


def long_prompt(family: str, batch: int, length: int, padded: int) -> dict[str, torch.Tensor]:
    """Return a prompt of as many tokens, for an encoder and for what its decoder begins with."""
    inputs = prompt(family, batch, length, padded)
    if family in WITH_ENCODER:
        ids = torch.randint(2, VOCABULARY, (batch, length))
        inputs["decoder_input_ids"] = ids
    return inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_every_length_up_to_300_tokens(family: str) -> None:
    model = make(family, positions=LONG + 20)
    fast = turbotx.optimize(model)
    for batch, length, padded in ((1, LONG, 0), (3, LONG - 1, 5), (1, 63, 0), (3, 65, 2)):
        inputs = long_prompt(family, batch, length, padded)
        for way in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
            assert torch.equal(generate(fast, inputs, **way), generate(model, inputs, **way))
    assert fast.stats()["eager_calls"] == 0


class Collects(transformers.generation.streamers.BaseStreamer):
    """Keeps what it is handed, step by step."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.steps.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamer_gets_each_token_as_it_is_made(family: str) -> None:
    model = make(family)
    fast, inputs = turbotx.optimize(model), prompt(family, 1, 7)
    ours, theirs = Collects(), Collects()
    got = generate(fast, inputs, 10, streamer=ours)
    assert torch.equal(got, generate(model, inputs, 10, streamer=theirs))
    assert ours.steps == theirs.steps and len(ours.steps) == 11 and ours.ended
    assert fast.stats()["eager_calls"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_an_assistant_proposes_tokens(family: str) -> None:
    model, assistant = make(family), make(family, seed=1)
    fast, quick = turbotx.optimize(model), turbotx.optimize(assistant)
    inputs, way = prompt(family, 1, 9), {"do_sample": False}
    want = generate(model, inputs, assistant_model=assistant, **way)
    for helper in (assistant, quick):
        assert torch.equal(generate(fast, inputs, assistant_model=helper, **way), want)
    for one in (fast, quick):
        assert one.stats()["captures"] > 0 and one.stats()["eager_calls"] == 0


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in WITH_ENCODER])
def test_tokens_are_looked_up_in_the_prompt(family: str) -> None:
    model = make(family)
    fast = turbotx.optimize(model)
    inputs = {"input_ids": prompt(family, 1, 5)["input_ids"].repeat(1, 3)}
    way = {"prompt_lookup_num_tokens": 3, "do_sample": False}
    assert torch.equal(generate(fast, inputs, **way), generate(model, inputs, **way))
    assert fast.stats()["eager_calls"] == 0
