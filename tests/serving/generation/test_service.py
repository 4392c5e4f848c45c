"""Sequences of many requests at once: each gets what it would get alone."""

from __future__ import annotations

import asyncio
import contextlib
import time

import numpy as np
import pytest

pytest.importorskip("starlette")

from tests.serving.generation.tiny_decoders import (
    END,
    bloom,
    gemma3,
    generator,
    gpt2,
    is_greedy,
    llama,
    make_service,
)
from turbotx.serving.generation.sampling import Sampling
from turbotx.serving.generation.sequence import Asked
from turbotx.serving.refusals import BackendFailed, Busy, NotReady, TimedOut, TooLarge
from turbotx.serving.settings import Settings

GREEDY = Sampling(temperature=0)
POSITION = 2 * 32 * 4
"""Bytes of a position of a layer."""


@contextlib.asynccontextmanager
async def running(*arguments, **options):
    service = make_service(*arguments, **options)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


def random_prompts(count, longest, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 200, n).tolist() for n in rng.integers(1, longest + 1, count)]


async def tokens_of(service, prompt, asked, after=None):
    """The tokens of one prompt; leaves after so many, where it is told to."""
    tokens, finish = [], None
    pieces = service.generate([prompt], [asked])
    async for _, piece in pieces:
        tokens += [] if piece.picked is None else [piece.picked.token]
        finish = piece.finish
        if after is not None and len(tokens) >= after:
            break
    await pieces.aclose()
    return tokens, finish


async def until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("waited in vain")


def is_empty(service):
    figures = service.worker.figures()
    return not any(figures[name] for name in (
        "sequences_waiting", "sequences_running", "cache_blocks_used", "cache_nbytes",
    ))  # fmt: skip


@pytest.mark.parametrize("make", [gpt2, llama, gemma3, bloom])
def test_each_gets_the_tokens_that_it_would_get_alone(make):
    prompts = random_prompts(24, 60)

    async def ask():
        async with running(make) as service:

            async def one(i, prompt):
                await asyncio.sleep(0.003 * i)
                return await tokens_of(service, prompt, Asked(5 + i, frozenset([END]), (), GREEDY))

            found = await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts)))
            await until(lambda: is_empty(service))
            return found

    model = generator(make).model
    for i, (prompt, (tokens, finish)) in enumerate(zip(prompts, asyncio.run(ask()), strict=True)):
        assert is_greedy(model, prompt, tokens)
        assert END not in tokens
        assert (finish == "length") == (len(tokens) == 5 + i), "a text that ended early met its end"
    assert generator(make).module.stats()["captures"] == 1


def test_who_gives_way_goes_on_where_it_was():
    """Room for three short rows and two long ones: the youngest are read again, tokens and all."""
    asked = Asked(120, frozenset(), (), Sampling(temperature=0.8, seed=5))
    prompts = random_prompts(6, 30)

    async def ask(nbytes, together):
        async with running(max_cache_nbytes=nbytes) as service:
            work = [tokens_of(service, p, asked) for p in prompts]
            found = await asyncio.gather(*work) if together else [await w for w in work]
            return [t for t, _ in found], service.scheduler.preemptions

    alone, _ = asyncio.run(ask(64 << 20, together=False))
    crowded, preemptions = asyncio.run(ask(2 * 7 * 64 * POSITION, together=True))
    assert preemptions > 0
    same = [a == b for a, b in zip(alone, crowded, strict=True)]
    assert sum(same) >= 5  # a draw at the edge of two tokens may fall to either side


def test_a_thousand_requests_that_leave_at_random_free_everything():
    rng = np.random.default_rng(1)

    async def ask():
        nbytes = 2 * 8 * 64 * POSITION  # eight blocks of both layers
        async with running(max_waiting=1000, max_sequences=12, max_cache_nbytes=nbytes) as service:

            async def one(prompt):
                await asyncio.sleep(float(rng.random()) * 2)
                after = int(rng.integers(1, 12)) if rng.random() < 0.7 else None
                with contextlib.suppress(asyncio.CancelledError):
                    task = asyncio.ensure_future(
                        tokens_of(service, prompt, Asked(10, sampling=GREEDY), after)
                    )
                    if rng.random() < 0.3:
                        await asyncio.sleep(float(rng.random()) * 0.2)
                        task.cancel()
                    await task

            await asyncio.gather(*(one(p) for p in random_prompts(1000, 12)))
            await until(lambda: is_empty(service))
            stats = service.generator.module.stats()
            return stats["cache_nbytes"], stats["cache_blocks"]

    assert asyncio.run(ask()) == (0, 0)


def count_read(service):
    return service.metrics.registry.get_sample_value("turbotx_prompt_tokens_total")


def test_texts_of_one_prompt_read_it_once_and_share_its_blocks():
    prompt = random_prompts(1, 1)[0] + list(range(4, 104))

    async def ask():
        async with running(prefill_tokens=64) as service:
            before = count_read(service)
            asked = [Asked(3, sampling=Sampling(seed=s)) for s in range(3)]
            most, tokens = 0, [[] for _ in asked]
            async for index, piece in service.generate([prompt] * 3, asked):
                tokens[index].append(piece.picked.token)
                most = max(most, service.worker.batch.layer_blocks)
            alone = [(await tokens_of(service, prompt, one))[0] for one in asked]
            return count_read(service) - before, most, tokens, alone

    read, most, tokens, alone = asyncio.run(ask())
    assert tokens == alone
    assert read == len(prompt) * 4, "three texts at once, and one after another"
    assert most <= 2 * (1 + 3), "a whole block of all, and one of each, in both layers"


def test_refusals():
    async def ask():
        service = make_service(settings=Settings(timeout_ms=20.0), max_waiting=1)
        with pytest.raises(NotReady):
            await tokens_of(service, [5], Asked(1))
        await service.start()
        with pytest.raises(TooLarge, match="model's 160"):
            await tokens_of(service, [5] * 100, Asked(61))
        batch = service.worker.batch
        read, batch.read = batch.read, lambda *given: (time.sleep(0.3), read(*given))[1]
        with pytest.raises(TimedOut, match="no token within 20 ms"):
            await tokens_of(service, [5] * 150, Asked(5))
        await until(lambda: is_empty(service))
        batch.read = read
        service.scheduler.waiting += ["a", "b"]  # as if somebody were before
        with pytest.raises(Busy):
            await tokens_of(service, [5], Asked(1))
        service.scheduler.waiting.clear()
        await service.stop()
        with pytest.raises(NotReady):
            await tokens_of(service, [5], Asked(1))

    asyncio.run(ask())


def test_a_failing_model_is_told_and_the_next_request_is_answered():
    async def ask():
        async with running() as service:
            batch = service.worker.batch
            call, batch.module = batch.module, lambda **inputs: 1 / 0
            with pytest.raises(BackendFailed, match="division by zero"):
                await tokens_of(service, [5], Asked(3))
            batch.module = call
            return await tokens_of(service, [5], Asked(3, sampling=GREEDY))

    tokens, finish = asyncio.run(ask())
    assert len(tokens) == 3 and finish == "length"


def test_stop_strings_and_seeds():
    async def ask():
        async with running() as service:

            async def text_of(asked):
                pieces = [p async for _, p in service.generate([[5, 6]], [asked])]
                return "".join(p.text for p in pieces), pieces[-1].finish

            whole, _ = await text_of(Asked(12, sampling=GREEDY))
            words = whole.split()
            cut, why = await text_of(Asked(12, stops=[f" {words[4]}"], sampling=GREEDY))
            drawn = [await text_of(Asked(12, sampling=Sampling(seed=s))) for s in (1, 1, 2)]
            return whole, words, cut, why, drawn

    whole, words, cut, why, drawn = asyncio.run(ask())
    assert why == "stop" and whole.startswith(cut) and f" {words[4]}" not in cut
    assert drawn[0] == drawn[1] != drawn[2]
