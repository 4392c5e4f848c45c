"""What is told, and when, where steps overlap with what their tokens become."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("starlette")

from tests.serving.generation.test_service import GREEDY, random_prompts, running
from tests.serving.generation.tiny_decoders import gpt2
from turbotx.serving.generation.batch import DecodeBatch
from turbotx.serving.generation.sampling import Sampling
from turbotx.serving.generation.sequence import Asked
from turbotx.serving.generation.text import TextStream
from turbotx.serving.refusals import BackendFailed


async def collect(service, prompt, asked, after=None):
    """Every piece's text, token and finish; leaves after so many, where it is told to."""
    found = []
    pieces = service.generate([prompt], [asked])
    async for _, piece in pieces:
        found.append((piece.text, piece.picked, piece.finish))
        if len(found) == after:
            break
    await pieces.aclose()
    return found


def asked_of(kind, text):
    """Texts that end by their length, by a stop string, by an end token; greedy and drawn."""
    options = [
        Asked(9, sampling=GREEDY),
        Asked(30, stops=[text], sampling=GREEDY),
        Asked(30, ends=frozenset(range(50, 120)), sampling=GREEDY),
        Asked(12, sampling=Sampling(seed=3, logprobs=2)),
        Asked(1, sampling=GREEDY),
    ]
    return options[kind % len(options)]


async def pieces_of_many(**options):
    prompts = random_prompts(10, 20)
    async with running(gpt2, **options) as service:
        first = await collect(service, prompts[1], Asked(6, sampling=GREEDY))
        stop = "".join(text for text, _, _ in first)[-3:]
        found = await asyncio.gather(*(
            collect(service, prompt, asked_of(k, stop), after=3 if k == 5 else None)
            for k, prompt in enumerate(prompts)
        ))  # fmt: skip
    figures = service.worker.figures() if service.state == "ready" else {}
    return found, figures


def test_pieces_are_the_same_where_steps_overlap_with_their_texts(monkeypatch):
    plain, _ = asyncio.run(pieces_of_many())
    monkeypatch.setattr(DecodeBatch, "overlaps", True)
    overlapped, _ = asyncio.run(pieces_of_many())
    assert overlapped == plain
    ends = [pieces[-1][2] for k, pieces in enumerate(plain) if k != 5]
    assert None not in ends and {"stop", "length"} <= set(ends)


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_text_that_fails_does_not_end_the_others(monkeypatch, overlaps):
    monkeypatch.setattr(DecodeBatch, "overlaps", overlaps)
    push = TextStream.push
    failing = []

    def push_or_fail(self, token):
        if self in failing:
            raise RuntimeError("no such piece")
        if not failing:
            failing.append(self)
        return push(self, token)

    monkeypatch.setattr(TextStream, "push", push_or_fail)

    async def life():
        prompts = random_prompts(4, 9)
        async with running(gpt2) as service:
            found = await asyncio.gather(
                *(collect(service, p, Asked(8, sampling=GREEDY)) for p in prompts),
                return_exceptions=True,
            )
            while service.worker.figures()["sequences_running"]:
                await asyncio.sleep(0.01)
        return found

    found = asyncio.run(life())
    refused = [f for f in found if isinstance(f, Exception)]
    assert len(refused) == 1 and isinstance(refused[0], BackendFailed)
    assert "the tokenizer failed: RuntimeError" in str(refused[0])
    assert [len(f) for f in found if not isinstance(f, Exception)] == [8, 8, 8]
