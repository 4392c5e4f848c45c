"""The dynamic program against brute force, and its two implementations against each other."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbotx.serving.cost import CostTable, CostTableError, make_monotone
from turbotx.serving.native import load_planner
from turbotx.serving.plan import fill_in_python, split


def set_partitions(items):
    """Every way to divide a list into unordered groups."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for size in range(len(rest) + 1):
        for others in itertools.combinations(range(len(rest)), size):
            left = [x for i, x in enumerate(rest) if i not in others]
            for partition in set_partitions(left):
                yield [[first, *(rest[i] for i in others)], *partition]


@st.composite
def monotone_tables(draw, max_length=12, max_batch=5):
    cells = draw(st.lists(st.floats(0.01, 10), min_size=60, max_size=60))
    grid = make_monotone(np.array(cells).reshape(max_length, max_batch))
    return CostTable(range(1, max_length + 1), range(1, max_batch + 1), grid).dense()


def total(groups, table):
    return sum(table[max(g), len(g)] if len(g) < table.shape[1] else math.inf for g in groups)


@given(monotone_tables(), st.lists(st.integers(1, 12), min_size=1, max_size=7))
def test_no_partition_is_cheaper(table, lengths):
    groups = split(sorted(lengths), table)
    best = min(total(partition, table) for partition in set_partitions(lengths))
    assert groups.total_ms == pytest.approx(best)


@given(
    monotone_tables(),
    st.lists(st.integers(1, 12), min_size=1, max_size=10),
    st.lists(st.floats(0.1, 10), min_size=10, max_size=10),
)
def test_priced_groups_equal_brute_force_over_cuts(table, lengths, prices):
    lengths, n = sorted(lengths), len(lengths)
    price = np.array(prices[:n])

    def charge(cuts):
        ends = [0, *cuts, n]
        pairs = list(itertools.pairwise(ends))
        if any(j - i >= table.shape[1] for i, j in pairs):
            return math.inf
        return sum(price[i] * table[lengths[j - 1], j - i] for i, j in pairs)

    groups = split(lengths, table, price)
    found = charge([end for _, end in groups.pairs()][:-1])
    cuts = (c for k in range(n) for c in itertools.combinations(range(1, n), k))
    assert found == pytest.approx(min(map(charge, cuts)))


@given(monotone_tables(), st.lists(st.integers(1, 12), min_size=0, max_size=40))
def test_python_and_cpp_fill_agree(table, lengths):
    length = np.array(sorted(lengths), dtype=np.int64)
    price = np.linspace(2.0, 1.0, len(length))
    fill = load_planner("fill")
    if fill is None:
        pytest.skip("no C++ compiler")
    sizes = fill_in_python(length, table, price)
    best, size = np.empty(len(length) + 1), np.zeros(len(length) + 1, dtype=np.int64)
    arrays = (length, table, price, best, size)
    fill(len(length), table.shape[1] - 1, table.shape[1], *(a.ctypes.data for a in arrays))
    assert size.tolist() == sizes.tolist()


def test_plans_in_python_without_a_compiler(monkeypatch):
    monkeypatch.setattr("turbotx.serving.plan.load_planner", lambda name: None)
    table = CostTable.from_function(lambda n, b: 1 + 0.1 * n * b).dense()
    assert split([3, 4, 90, 91], table).pairs() == ((0, 2), (2, 4))


def test_groups_by_hand():
    table = CostTable.from_function(lambda n, b: 10 + n * b, max_length=50, max_batch=3).dense()
    assert split([1, 2, 2, 40], table).pairs() == ((0, 3), (3, 4))
    assert split([1, 2, 2, 2], table).pairs() in {((0, 1), (1, 4)), ((0, 2), (2, 4))}


def test_token_limit_cuts_groups_but_lets_a_long_request_through():
    costs = CostTable.from_function(lambda n, b: 10 + 0.01 * n * b, max_length=50, max_batch=8)
    table = costs.dense(max_tokens=20)
    sizes = sorted(j - i for i, j in split([10, 10, 10, 30], table).pairs())
    assert sizes == [1, 1, 2]


def test_refuses_what_it_cannot_plan():
    table = CostTable.from_function(lambda n, b: n * b, max_length=9, max_batch=2).dense()
    with pytest.raises(CostTableError, match="run from 3 to 10"):
        split([3, 10], table)
    with pytest.raises(ValueError, match="ascending"):
        split([3, 2], table)
    assert split([], table).pairs() == ()
