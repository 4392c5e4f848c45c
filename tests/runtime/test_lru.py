"""The least recently used entry goes first, and no more are kept than are allowed."""

from __future__ import annotations

from turbotx.runtime.lru import LruDict


def test_what_was_used_longest_ago_is_dropped() -> None:
    kept: LruDict[str, int] = LruDict(2)
    kept["a"], kept["b"] = 1, 2
    assert kept.find("a") == 1 and kept.find("c") is None
    kept["c"] = 3
    assert dict(kept) == {"a": 1, "c": 3}
    kept["a"] = 4  # set anew: used
    kept["d"] = 5
    assert dict(kept) == {"a": 4, "d": 5}


def test_reading_is_no_use() -> None:
    kept: LruDict[str, int] = LruDict(2)
    kept["a"], kept["b"] = 1, 2
    assert kept["a"] == kept.get("a") == 1
    kept["c"] = 3
    assert list(kept) == ["b", "c"]


def test_none_are_kept_where_none_may_be() -> None:
    kept: LruDict[str, int] = LruDict(0)
    kept["a"] = 1
    assert not kept
