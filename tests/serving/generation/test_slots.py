"""Rows of a batch: where they end, which columns and blocks they take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbotx.serving.generation.slots import BLOCK, Entry, Slots


def test_the_first_ones_make_the_batch():
    slots = Slots()
    slots.join([Entry("a", 5), Entry("b", 9)], end=9)
    assert [e.key for e in slots.rows] == ["a", "b"] and slots.length == 9 and slots.blocks == 2


def test_a_row_moves_by_whole_blocks():
    slots = Slots()
    slots.join([Entry("a", 5)], end=2 * BLOCK + 9)
    assert slots.length == 9
    slots.join([Entry("b", 100)], end=3 * BLOCK + 9)
    assert slots.length == BLOCK + 9 + BLOCK * (BLOCK + 9 < 100)
    assert slots.blocks == 1 + 3
    with pytest.raises(ValueError, match="column 10 cannot join a batch of 137"):
        slots.join([Entry("c", 1)], end=10)
    slots.leave("b")
    assert slots.length == 9 and slots.blocks == 1


def test_columns_are_left_empty_so_that_a_reading_ends_where_the_batch_does():
    slots = Slots()
    assert slots.pad(70, piece=20) == 0  # nobody is there
    slots.join([Entry("a", 5)], end=5)
    pad = slots.pad(70, piece=20)
    for _ in range(3):
        slots.advance()
    assert pad == (8 - 70) % BLOCK
    slots.join([Entry("b", 70)], end=pad + 70)
    assert slots.length == BLOCK + 8 and slots.blocks == 1 + 2


def test_a_step_adds_a_position_to_every_row():
    slots = Slots()
    slots.join([Entry("a", 5), Entry("b", 9)], end=9)
    slots.leave("b")
    slots.advance()
    assert slots.length == 10 and slots.rows == [Entry("a", 6)]
    slots.leave("a")
    assert slots.length == 0 and slots.rows == []


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 200)), max_size=40))
def test_rows_hold_who_joined_and_has_not_left(moves):
    slots, expected, made = Slots(), {}, 0
    for move, number in moves:
        before = slots.length
        if move == 0:
            made += 1
            slots.join([Entry(made, number)], slots.pad(number, number) + number)
            expected[made] = number
        elif move == 1 and expected:
            key = sorted(expected)[number % len(expected)]
            del expected[key]
            slots.leave(key)
        elif expected:
            slots.advance()
            before, expected = before + 1, {k: n + 1 for k, n in expected.items()}
        assert {e.key: e.count for e in slots.rows} == expected
        longest = max(expected.values(), default=0)
        assert longest <= slots.length < longest + BLOCK
        assert not before or not expected or (slots.length - before) % BLOCK == 0
        assert slots.blocks <= sum(1 + -(-n // BLOCK) for n in expected.values())
