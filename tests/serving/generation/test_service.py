"""Sequences of many requests at once: each gets what it would get alone."""

from __future__ import annotations

import asyncio
import contextlib
import time

import numpy as np
import pytest

pytest.importorskip("starlette")

from tests.serving.generation.tiny_decoders import (
    CONTEXT,
    END,
    bloom,
    gemma3,
    generator,
    gpt2,
    gpt_neo,
    is_greedy,
    llama,
    make_service,
    mpt,
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
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)  # a request of 30 steps may be over after 10 ms
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
    """Prompts of 1 to 80 tokens of which many begin alike; what is not free is kept for others."""
    rng = np.random.default_rng(1)
    common = random_prompts(1, 1, seed=2)[0] * 68

    async def ask():
        nbytes = 2 * 12 * 64 * POSITION  # twelve blocks of both layers
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

            prompts = [[*common[: 68 * (rng.random() < 0.2)], *p] for p in random_prompts(1000, 12)]
            await asyncio.gather(*(one(p) for p in prompts))
            await until(lambda: is_empty(service))
            figures, batch = service.worker.figures(), service.worker.batch
            kept, stats = figures["cache_blocks_cached"], service.generator.module.stats()
            assert figures["cache_blocks_evicted"] > 0 and batch.prefixes.root.children
            assert 0 < kept == stats["cache_blocks"] <= figures["cache_blocks_most"]
        stats = service.generator.module.stats()
        return stats["cache_nbytes"], stats["cache_blocks"], batch.prefixes.root.children

    assert asyncio.run(ask()) == (0, 0, {})


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
    assert read == len(prompt) + 3 * (len(prompt) - 64), "at once, and three times after a block"
    assert most <= 2 * (1 + 3), "a whole block of all, and one of each, in both layers"


@pytest.mark.parametrize("make", [gpt2, llama, bloom])
def test_turns_of_conversations_read_their_new_tokens_alone(make):
    """Three conversations of three turns, at once and beside others, with one beginning in common:
    as without reuse of prefixes."""
    rng = np.random.default_rng(3)
    common = rng.integers(4, 200, 70).tolist()
    turns = [[rng.integers(4, 200, n).tolist() for n in (3 + i, 9, 5)] for i in range(3)]

    async def talk(service, news):
        text, cached, ends = list(common), [], []
        for new in news:
            text += new
            pieces = service.generate([text], [Asked(12, sampling=GREEDY)])
            found = [piece async for _, piece in pieces]
            cached.append((len(text), found[-1].cached))
            text += [p.picked.token for p in found if p.picked]
            ends.append(len(text))
        return text, cached

    async def ask(prefix_cache):
        async with running(make, prefix_cache=prefix_cache) as service:
            before = count_read(service)
            others = [tokens_of(service, p, Asked(20)) for p in random_prompts(5, 40)]
            found = await asyncio.gather(*(talk(service, news) for news in turns), *others)
            await until(lambda: is_empty(service))
            again = await talk(service, turns[0])
            return [*found[:3], again], count_read(service) - before

    plain, all_tokens = asyncio.run(ask(prefix_cache=False))
    assert all(cached == 0 for _, turn in plain for _, cached in turn)
    reused, fewer = asyncio.run(ask(prefix_cache=True))
    model = generator(make).model
    for (text, turn), (other, _), news in zip(reused, plain, [*turns, turns[0]], strict=True):
        at = len(common)
        for new in news:
            at += len(new)
            assert is_greedy(model, text[:at], text[at : at + 12])
            at += 12
        assert len(text) == len(other)
        assert all(length - cached < 64 + 21 for length, cached in turn[1:]), turn
    assert reused[3][1][0][1] >= 64 and fewer < all_tokens


def test_requests_in_flight_share_the_blocks_of_a_prompt():
    common = random_prompts(1, 1)[0] + list(range(4, 104))
    asked = Asked(30, sampling=GREEDY)

    async def ask():
        async with running() as service:
            first = asyncio.ensure_future(tokens_of(service, [*common, 7], asked))
            await until(lambda: service.worker.batch.slots.rows)
            pieces = service.generate([[*common, 9, 8]], [asked])
            found = [piece async for _, piece in pieces]
            batch, hits = service.worker.batch, found[0].cached
            return (await first)[0], [p.picked.token for p in found], hits, batch.prefixes.evicted

    first, second, hits, evicted = asyncio.run(ask())
    assert hits == 64 and evicted == 0
    model = generator().model
    assert is_greedy(model, [*common, 7], first) and is_greedy(model, [*common, 9, 8], second)


def test_blocks_are_evicted_when_free_ones_run_out_and_not_before():
    prompts = [[4 + i] * 70 for i in range(9)]

    async def ask():
        async with running(max_cache_nbytes=2 * 5 * 64 * POSITION) as service:
            seen = []
            for prompt in [*prompts, *prompts[-2:], prompts[0]]:
                pieces = [p async for _, p in service.generate([prompt], [Asked(3)])]
                await until(lambda: is_empty(service))
                figures = service.worker.figures()
                seen.append([pieces[0].cached, figures["cache_blocks_cached"],
                             figures["cache_blocks_evicted"]])  # fmt: skip
            return seen

    seen = asyncio.run(ask())
    assert [hit for hit, _, _ in seen] == [0] * 9 + [64, 64, 0], "the oldest are gone"
    assert [kept for _, kept, _ in seen[:5]] == [2, 4, 6, 8, 8], "each leaves a block a layer"
    assert [gone for _, _, gone in seen[:4]] == [0] * 4 and seen[4][2] == 2


def test_layers_that_see_a_window_reuse_nothing():
    prompt = random_prompts(1, 1)[0] + list(range(4, 104))

    async def ask():
        async with running(gemma3) as service:
            found = [await tokens_of(service, prompt, Asked(5, sampling=GREEDY)) for _ in range(2)]
            return service.worker.batch.no_prefixes, service.scheduler.limits, found

    why, limits, found = asyncio.run(ask())
    assert "window" in why and not limits.prefix_cache and found[0] == found[1]
    assert is_greedy(generator(gemma3).model, prompt, found[0][0])


@pytest.mark.parametrize("make", [mpt, gpt_neo])
def test_models_that_count_empty_columns_reuse_prefixes_where_there_are_none(make):
    """Alone a prompt follows its known block; beside others it would end in another column."""
    common = list(range(4, 84))
    prompts = [[*common, *more] for more in random_prompts(6, 40)]
    asked = Asked(12, sampling=GREEDY)

    async def ask():
        async with running(make) as service:
            assert service.worker.batch.no_prefixes is None
            assert not service.worker.batch.prefixes.gaps
            cached = []
            for prompt in prompts[:2]:
                pieces = [p async for _, p in service.generate([prompt], [asked])]
                tokens = [p.picked.token for p in pieces if p.picked]
                assert is_greedy(generator(make).model, prompt, tokens)
                cached.append(pieces[0].cached)
                await until(lambda: is_empty(service))
            at_once = [tokens_of(service, prompt, asked) for prompt in prompts]
            return cached, await asyncio.gather(*at_once)

    cached, found = asyncio.run(ask())
    assert cached == [0, 64]
    for prompt, (tokens, _) in zip(prompts, found, strict=True):
        assert len(tokens) == 12 and is_greedy(generator(make).model, prompt, tokens)


@pytest.mark.parametrize("make", [mpt, gpt_neo])
def test_rows_stay_within_the_columns_that_a_model_has_a_table_of(make):
    """Long texts beside others: empty columns must not push them over the model's positions."""
    sizes = [(37, 100), (52, 90), (140, 20), (80, 80)]
    prompts = [list(range(4, 4 + n)) for n, _ in sizes]

    async def ask():
        async with running(make) as service:
            assert service.worker.batch.slots.most == CONTEXT
            tasks = []
            for prompt, (_, count) in zip(prompts, sizes, strict=True):
                asked = Asked(count, sampling=GREEDY)
                tasks.append(asyncio.ensure_future(tokens_of(service, prompt, asked)))
                await until(lambda: service.worker.batch.slots.rows)
            return await asyncio.gather(*tasks)

    for prompt, (_, count), (tokens, _) in zip(prompts, sizes, asyncio.run(ask()), strict=True):
        assert len(tokens) == count and is_greedy(generator(make).model, prompt, tokens)


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
