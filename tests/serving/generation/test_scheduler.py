"""Who is read, who decodes, who gives way; and the same in simulated time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serving.generation.simulation import (
    Arrival,
    Simulated,
    SimulatedBlocks,
    StepCosts,
    simulate,
)
from turbotx.serving.generation.scheduler import GenerationLimits, GenerationScheduler
from turbotx.serving.generation.slots import BLOCK, Entry, Slots
from turbotx.serving.refusals import Busy, TooLarge
from turbotx.serving.settings import SettingsError

LIMITS = GenerationLimits(max_sequences=4, max_blocks=8, prefill_tokens=32,
                          max_waiting=3, context=300)  # fmt: skip


def sequence(prompt, tokens=5, priority=0):
    return Simulated(Arrival(0.0, prompt, tokens, priority))


def blocks_of(*entries, end=0):
    slots = Slots()
    if entries:
        slots.join(list(entries), end)
    return SimulatedBlocks(slots, LIMITS.prefill_tokens)


def keys_of(turn):
    return [] if turn.begin is None else turn.begin.keys


def lengths(sequences):
    return [len(s.prompt) for s in sequences]


def test_prompts_are_read_together_as_long_as_a_piece_is_not_too_large():
    scheduler = GenerationScheduler(LIMITS)
    scheduler.submit([sequence(9), sequence(8), sequence(10), sequence(16)])
    turn = scheduler.next(blocks_of())
    assert lengths(keys_of(turn)) == [9, 8, 10] and turn.read and not turn.step
    again = scheduler.next(blocks_of())
    assert again.begin is None and again.read  # goes on
    scheduler.have_read()
    assert len(scheduler.running) == 3 and lengths(keys_of(scheduler.next(blocks_of()))) == [16]


def test_equal_prompts_are_read_as_one():
    scheduler = GenerationScheduler(LIMITS)
    one, other = sequence(30), sequence(30)
    scheduler.submit([one, one, one, other])
    assert len(keys_of(scheduler.next(blocks_of()))) == 3


def test_no_more_than_so_many_decode_together():
    scheduler = GenerationScheduler(LIMITS)
    scheduler.submit([sequence(1) for _ in range(6)])
    assert len(keys_of(scheduler.next(blocks_of()))) == 4
    scheduler.have_read()
    assert scheduler.next(blocks_of()).begin is None


def test_who_would_pass_the_models_columns_waits_until_the_batch_ends_elsewhere():
    scheduler, blocks = GenerationScheduler(LIMITS), blocks_of(Entry("a", 10), end=10)
    blocks.slots.most = 2 * BLOCK
    scheduler.running.append(sequence(10))
    scheduler.submit([sequence(20, 2 * BLOCK - 20 - 9)])
    waited = 0
    while scheduler.next(blocks).begin is None:
        blocks.slots.advance()
        waited += 1
    # 10 columns and so many more, less 20: 9 empty ones may come before the prompt.
    assert (10 + waited - 20) % BLOCK <= 9 and waited == 10


def test_higher_classes_come_first():
    scheduler = GenerationScheduler(LIMITS)
    scheduler.submit([sequence(1, priority=-1), sequence(2), sequence(3, priority=1), sequence(4)])
    assert lengths(scheduler.waiting) == [3, 2, 4, 1]


def test_an_idle_server_takes_any_request_a_busy_one_refuses():
    scheduler = GenerationScheduler(LIMITS)
    scheduler.submit([sequence(1) for _ in range(9)])
    with pytest.raises(Busy, match="9 sequences wait"):
        scheduler.submit([sequence(1)])


def test_what_can_never_run_is_refused():
    scheduler = GenerationScheduler(LIMITS)
    with pytest.raises(TooLarge, match=r"200 tokens of prompt and 101 .* model's 300"):
        scheduler.check(200, 301)
    small = GenerationScheduler(GenerationLimits(max_blocks=1, context=300))
    small.check(10, BLOCK)
    with pytest.raises(TooLarge, match="max-cache-nbytes"):
        small.check(10, BLOCK + 1)


def test_the_youngest_of_the_lowest_class_gives_way_and_comes_back_first():
    scheduler = GenerationScheduler(LIMITS)
    high = sequence(100, priority=1)
    old, young = sequence(101), sequence(102)
    scheduler.running = [old, young, high]
    blocks = blocks_of(*(Entry(s, len(s.prompt)) for s in scheduler.running), end=2 * BLOCK)
    waiting = sequence(5)
    scheduler.submit([waiting])
    assert blocks.used == 6 and blocks.needed() == 3
    assert scheduler.give_way(blocks) == [young]
    blocks.leave(young)
    assert scheduler.waiting == [young, waiting] and scheduler.running == [old, high]
    assert scheduler.give_way(blocks) == [] and scheduler.preemptions == 1


def test_those_who_are_read_give_way_unless_a_lower_class_decodes():
    for priority in (0, -1):
        scheduler = GenerationScheduler(LIMITS)
        decoding, first, second = sequence(200, priority=priority), sequence(300), sequence(300)
        scheduler.running, scheduler.reading = [decoding], [first, second]
        blocks = blocks_of(Entry(decoding, 200), end=200)
        blocks.begin(blocks.lay_out([first, second]))
        blocks.reading.done, blocks.reading.next = 150, 182
        wanted = [first, second] if priority == 0 else [decoding]
        assert blocks.reading.pad == 37 and blocks.used == 4 + 2 * 3
        assert scheduler.give_way(blocks) == wanted and scheduler.waiting == wanted


def test_the_last_one_is_read_again_where_its_first_block_is_half_empty():
    scheduler = GenerationScheduler(GenerationLimits(max_blocks=2))
    scheduler.running = [sequence(100)]
    blocks = blocks_of(Entry(scheduler.running[0], 100), end=2 * BLOCK)
    assert scheduler.give_way(blocks) == scheduler.waiting and len(scheduler.waiting) == 1
    blocks = blocks_of()
    reading = scheduler.next(blocks).begin
    blocks.begin(reading)
    assert len(reading.rows) == 1 and blocks.needed() <= 2 and scheduler.give_way(blocks) == []


def test_continuous_batching_is_faster_than_one_after_another():
    arrivals = [Arrival(0.0, 30, 60) for _ in range(32)]
    alone = simulate(arrivals, GenerationLimits(max_sequences=1))
    together = simulate(arrivals, GenerationLimits(max_sequences=8))
    assert together.tokens_per_s > 3 * alone.tokens_per_s


def test_prompts_that_begin_alike_are_answered_sooner():
    arrivals = [Arrival(500.0 * i, 520, 20, shared=512) for i in range(16)]
    reused = simulate(arrivals, GenerationLimits())
    plain = simulate(arrivals, GenerationLimits(prefix_cache=False))
    assert plain.cached == 0 and reused.cached >= 14 * 448
    assert reused.most_used < plain.most_used and reused.end_ms < plain.end_ms
    waits = [[s.first_ms - s.arrival.at_ms for s in x.sequences] for x in (reused, plain)]
    assert sum(waits[0]) < sum(waits[1]) / 4


def test_a_long_prompt_does_not_hold_up_those_who_decode():
    arrivals = [Arrival(0.0, 10, 200), Arrival(50.0, 1500, 5)]

    def longest_gap(piece):
        limits = GenerationLimits(prefill_tokens=piece, context=4096)
        outcome = simulate(arrivals, limits, StepCosts())
        first, second = outcome.sequences
        return (first.last_ms - first.first_ms) / 200, second.first_ms - 50

    steady, waited = longest_gap(64)
    assert steady < 20 and waited < 64 / 64 * 2000
    assert longest_gap(1500)[0] == pytest.approx(steady, rel=0.5)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 3000), st.integers(1, 250), st.integers(1, 60),
                          st.sampled_from([-1, 0, 1]), st.integers(0, 200)),
                max_size=30))  # fmt: skip
def test_everybody_is_answered_whole_or_refused_within_the_memory(asked):
    arrivals = [Arrival(at, n, m, rank, min(n, same)) for at, n, m, rank, same in asked]
    outcome = simulate(arrivals, LIMITS)
    for s in outcome.sequences:
        assert (s.refused is not None) != (s.made == s.arrival.tokens)
        assert s.refused is not None or s.last_ms >= s.first_ms >= s.arrival.at_ms
    assert outcome.most_used <= LIMITS.max_blocks


def test_overload_refuses_and_answers_the_rest():
    rng = np.random.default_rng(0)
    arrivals = [Arrival(float(t), int(p), int(n)) for t, p, n in zip(
        np.cumsum(rng.exponential(5, 400)), rng.integers(1, 100, 400), rng.integers(1, 50, 400),
        strict=True)]  # fmt: skip
    outcome = simulate(arrivals, GenerationLimits(max_sequences=4, max_waiting=16, context=300))
    answered = [s for s in outcome.sequences if s.refused is None]
    assert all(isinstance(s.refused, Busy) for s in outcome.sequences if s.refused)
    assert all(s.made == s.arrival.tokens for s in answered) and 20 < len(answered) < 300


@pytest.mark.parametrize("name", ["max_sequences", "prefill_tokens", "max_waiting"])
def test_limits_are_above_zero(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} must be above zero, got 0"):
        GenerationLimits(**{name: 0})
