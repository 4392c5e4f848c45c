"""Caches of rows of others, beside the same rows put together by hand."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from transformers import DynamicCache

import turbotx
from turbotx.engine.cache_rows import CacheRow, compose, put_row
from turbotx.errors import CacheFullError, InputError


@functools.cache
def make(**options):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=30, n_positions=80)
    model = transformers.GPT2LMHeadModel(config).eval()
    return model, turbotx.optimize(model, **options)


def fill(fast, rows, length):
    cache = DynamicCache()
    ids = torch.randint(0, 30, (rows, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        fast(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def rows_of(cache, row, count):
    return [(x.keys[row, :, -count:].clone(), x.values[row, :, -count:].clone())
            for x in cache.layers]  # fmt: skip


def is_row(cache, place, wanted):
    count = wanted[0][0].shape[1]
    return all(
        torch.equal(a, b)
        for pair, other in zip(rows_of(cache, place, count), wanted, strict=True)
        for a, b in zip(pair, other, strict=True)
    )


def test_rows_of_several_caches_end_together():
    _, fast = make()
    a, b = fill(fast, 1, 9), fill(fast, 3, 70)
    wanted = [rows_of(b, 2, 70), rows_of(a, 0, 9), rows_of(b, 0, 5)]
    made = compose([CacheRow(b, 2, 70), CacheRow(a, 0, 9), CacheRow(b, 0, 5)], 72)
    assert made.get_seq_length() == 72 and made.layers[0].keys.shape[0] == 3
    assert all(is_row(made, i, w) for i, w in enumerate(wanted))
    assert not made.layers[1].keys[1, :, : 72 - 9].any()
    assert b.get_seq_length() == 70  # as it was


def test_a_row_takes_the_place_of_another():
    _, fast = make()
    a, b = fill(fast, 2, 12), fill(fast, 1, 7)
    kept = rows_of(a, 0, 12)
    put_row(a, 1, CacheRow(b, 0, 7))
    assert is_row(a, 1, rows_of(b, 0, 7)) and is_row(a, 0, kept)


def test_a_composed_cache_goes_on_like_the_rows_alone():
    model, fast = make()
    caches = [fill(fast, 1, n) for n in (4, 11)]
    made = compose([CacheRow(caches[0], 0, 4), CacheRow(caches[1], 0, 11)], 11)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :7] = 0
    ids, positions = torch.tensor([[5], [6]]), torch.tensor([[4], [11]])
    with torch.no_grad():
        both = fast(input_ids=ids, attention_mask=mask, position_ids=positions,
                    past_key_values=made, use_cache=True).logits  # fmt: skip
        for row, cache in enumerate(caches):
            alone = model(input_ids=ids[row : row + 1], past_key_values=cache, use_cache=True)
            torch.testing.assert_close(both[row : row + 1], alone.logits, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused():
    _, fast = make()
    a = fill(fast, 1, 4)
    with pytest.raises(InputError, match="5 positions of a cache of 4"):
        compose([CacheRow(a, 0, 5)], 9)
    with pytest.raises(InputError, match="do not fit"):
        compose([CacheRow(a, 0, 4)], 3)
    with pytest.raises(InputError, match="not been filled"):
        compose([CacheRow(DynamicCache(), 0, 1)], 1)


def test_bytes_are_counted_and_bounded():
    _, fast = make(max_cache_nbytes=3 * 64 * 2 * 2 * 16 * 4)
    a = fill(fast, 1, 4)
    made = compose([CacheRow(a, 0, 4)] * 2, 4)
    assert fast.stats()["cache_nbytes"] == 3 * 64 * 2 * 2 * 16 * 4
    with pytest.raises(CacheFullError):
        compose([CacheRow(a, 0, 4)], 4)
    del made
    compose([CacheRow(a, 0, 4)], 4)
