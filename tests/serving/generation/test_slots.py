"""Rows of a batch: who has which, when memory is written anew, what it takes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from turbotx.serving.generation.slots import BLOCK, Entry, Place, Rebuild, Slots, held_positions


def test_the_first_ones_make_the_batch():
    slots = Slots()
    made = slots.join([Entry("a", 5), Entry("b", 9)])
    assert isinstance(made, Rebuild) and made.rows == [None, None] and made.length == 9
    assert [e.key for e in slots.live] == ["a", "b"] and slots.held == 2 * BLOCK


def test_a_shorter_one_takes_the_row_of_one_that_left():
    slots = Slots()
    slots.join([Entry("a", 5), Entry("b", 9)])
    slots.leave("a")
    assert slots.join([Entry("c", 9)]) == [Place(0, Entry("c", 9))]
    assert [e.key for e in slots.live] == ["c", "b"]


def test_a_longer_one_or_one_too_many_writes_all_anew():
    slots = Slots()
    slots.join([Entry("a", 5), Entry("b", 9)])
    slots.leave("a")
    made = slots.join([Entry("c", 10)])
    assert made.rows == [1, None] and made.length == 10
    made = slots.join([Entry("d", 1)])
    assert made.rows == [0, 1, None] and [e.key for e in made.entries] == ["b", "c", "d"]


def test_a_step_adds_a_position_to_every_row():
    slots = Slots()
    slots.join([Entry("a", 5), Entry("b", 9)])
    slots.leave("b")
    slots.advance()
    assert slots.length == 10 and slots.live == [Entry("a", 6)]


def test_memory_is_given_back_where_it_is_worth_it():
    slots = Slots()
    slots.join([Entry(i, 10) for i in range(8)])
    slots.leave(0)
    slots.leave(1)
    assert slots.tidy() is None  # a quarter of the rows
    slots.leave(2)
    assert slots.tidy().rows == [3, 4, 5, 6, 7] and slots.tidy() is None
    slots.join([Entry("long", 300)])
    slots.leave("long")
    slots.tidy()
    assert slots.length == 10
    for i in range(3, 8):
        slots.leave(i)
    assert slots.tidy() is None and slots.held == 0 and slots.rows == []


def test_force_gives_back_whatever_is_unused():
    slots = Slots()
    slots.join([Entry(i, 10) for i in range(8)])
    slots.leave(0)
    assert slots.tidy(force=True).rows == [1, 2, 3, 4, 5, 6, 7]
    assert slots.tidy(force=True) is None


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 200)), max_size=40))
def test_rows_hold_who_joined_and_has_not_left(moves):
    slots, expected, made = Slots(), {}, 0
    for move, number in moves:
        if move == 0:
            made += 1
            before = {e.key: i for i, e in enumerate(slots.rows) if e is not None}
            change = slots.join([Entry(made, number)])
            expected[made] = number
            if isinstance(change, Rebuild):
                assert [before.get(e.key) for e in change.entries] == list(change.rows)
            else:
                assert slots.rows[change[0].row].key == made
        elif move == 1 and expected:
            key = sorted(expected)[number % len(expected)]
            del expected[key]
            slots.leave(key)
        elif move == 2 and expected:
            slots.advance()
            expected = {k: n + 1 for k, n in expected.items()}
        else:
            slots.tidy(force=number % 2 == 0)
        assert {e.key: e.count for e in slots.live} == expected
        assert all(e.count <= slots.length for e in slots.live)
        assert slots.held == held_positions(len(slots.rows), slots.length)
