"""The response cache: bounded, least recently used out first."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from turbotx.serving.cache import ENTRY_NBYTES, CacheKey, ResponseCache
from turbotx.serving.tokens import TokenRow


def key(n, options="embedding", revision="r"):
    return CacheKey.of(revision, options, TokenRow((n,)))


def vector(n, width=4):
    return np.full(width, n, dtype=np.float32)


def test_what_was_put_and_a_copy_of_its_own():
    cache = ResponseCache(1 << 20)
    source = vector(1)
    assert cache.get(key(1)) is None
    cache.put(key(1), source)
    source[:] = 7
    assert cache.get(key(1)).tolist() == [1, 1, 1, 1]
    assert len(cache) == 1


def test_keys_differ_by_revision_options_ids_and_types():
    rows = [TokenRow((1, 2)), TokenRow((1, 2), (0, 1)), TokenRow((1, 2, 3))]
    keys = {CacheKey.of(r, o, row) for r in "ab" for o in "xy" for row in rows}
    assert len(keys) == 12


def test_the_least_recently_used_goes_first():
    cache = ResponseCache(2 * (16 + 4 + ENTRY_NBYTES))
    cache.put(key(1), vector(1))
    cache.put(key(2), vector(2))
    cache.get(key(1))
    cache.put(key(3), vector(3))
    assert cache.get(key(2)) is None and cache.get(key(1)) is not None


def test_what_is_larger_than_the_cache_is_not_kept():
    cache = ResponseCache(600)
    cache.put(key(1), vector(1))
    cache.put(key(2), vector(2, width=1000))
    assert len(cache) == 1 and cache.get(key(1)) is not None


def test_size_zero_is_off_and_counts_nothing():
    cache = ResponseCache(0)
    cache.put(key(1), vector(1))
    assert cache.get(key(1)) is None
    assert cache.nbytes == 0


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 300)), max_size=60))
def test_never_over_its_bytes(entries):
    cache = ResponseCache(3000)
    for n, width in entries:
        cache.put(key(n), vector(n, width))
        held = sum(v.nbytes + len(k.ids) + ENTRY_NBYTES for k, v in cache.entries.items())
        assert cache.nbytes == held <= 3000
