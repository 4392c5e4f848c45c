"""Length-aware routing, without any cluster."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from turbotx.serving.routing import LengthRouting


def trained(**options):
    routing = LengthRouting(**options)
    for length in range(1, 101):
        routing.rank(["a", "b"], length)
    return routing


def test_short_and_long_have_different_homes():
    routing = trained()
    assert routing.rank(["a", "b"], 5) == ["a", "b"]
    assert routing.rank(["a", "b"], 95) == ["b", "a"]


def test_a_busy_home_is_left():
    routing = trained(stickiness=4.0)
    for key in range(60):
        routing.sent("a", key, 10)
    assert routing.rank(["a", "b"], 5) == ["b", "a"]
    for key in range(60):
        routing.done(key)
    assert routing.outstanding("a") == 0
    assert routing.rank(["a", "b"], 5) == ["a", "b"]


def test_what_a_lost_replica_had_is_forgotten():
    routing = trained()
    routing.sent("a", 1, 500)
    routing.forget("a")
    routing.done(1)
    assert routing.outstanding("a") == 0


def test_one_replica_and_one_length():
    routing = LengthRouting()
    assert routing.rank(["a"], 9) == ["a"]
    assert sorted(routing.rank(["a", "b", "c"], 9)) == ["a", "b", "c"]


def test_work_stays_balanced_and_lengths_apart():
    routing, generator = LengthRouting(), random.Random(0)
    sent = {"a": [], "b": [], "c": []}
    live = []
    for key in range(3000):
        length = generator.randint(1, 500)
        replica = routing.rank(list(sent), length)[0]
        routing.sent(replica, key, length)
        sent[replica].append(length)
        live.append(key)
        if len(live) > 60:
            routing.done(live.pop(generator.randrange(len(live))))
    mean = {k: sum(v) / len(v) for k, v in sent.items()}
    assert mean["a"] < mean["b"] < mean["c"]
    tokens = sorted(sum(v) for v in sent.values())
    assert tokens[-1] < 3 * tokens[0]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 4))
def test_every_replica_is_ranked_once_within_a_small_window(lengths, count):
    routing = LengthRouting(window=8)
    replicas = [f"r{i}" for i in range(count)]
    for length in lengths:
        assert sorted(routing.rank(replicas, length)) == replicas
    assert routing.sorted_lengths == sorted(lengths[-8:])
