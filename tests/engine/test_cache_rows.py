"""Caches of rows of others, beside the same rows put together by hand."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import turbotx
from turbotx.engine.cache_rows import CacheRow, blank_like, compose, free_cache, free_row
from turbotx.errors import InputError


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


class Ops(TorchDispatchMode):
    """Every op of PyTorch that runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_rows_of_several_caches_end_together_and_no_keys_or_values_move():
    _, fast = make()
    a, b = fill(fast, 1, 9), fill(fast, 3, 73)
    wanted = [rows_of(b, 2, 73), rows_of(a, 0, 9), rows_of(b, 0, 5)]
    before = fast.stats()["cache_nbytes"]
    with Ops() as ops:
        made = compose([CacheRow(b, 2, 73), CacheRow(a, 0, 9), CacheRow(b, 0, 5)], 73)
    assert set(ops.names) <= {"aten::view.dtype", "aten::as_strided", "aten::detach"}, "views alone"
    assert fast.stats()["cache_nbytes"] == before
    assert made.get_seq_length() == 73 and made.layers[0].keys.shape[0] == 3
    assert all(is_row(made, i, w) for i, w in enumerate(wanted))
    assert not made.layers[1].keys[1, :, :64].any()
    assert b.get_seq_length() == 73  # as it was


def test_what_a_row_shares_is_copied_when_it_is_written_and_goes_with_the_last_one():
    _, fast = make()
    nbytes = fast.stats()["cache_nbytes"]
    a = fill(fast, 1, 9)
    one = fast.stats()["cache_nbytes"] - nbytes
    made = compose([CacheRow(a, 0, 9)] * 3, 9)
    wanted = rows_of(a, 0, 9)
    free_cache(a)
    with torch.no_grad():
        ids = torch.tensor([[3], [4], [5]])
        fast(input_ids=ids, past_key_values=made, use_cache=True)
    assert fast.stats()["cache_nbytes"] - nbytes == 3 * one
    made.crop(-1)
    assert all(is_row(made, i, wanted) for i in range(3))
    free_row(made, 1)
    assert fast.stats()["cache_nbytes"] - nbytes == 2 * one
    del made
    assert fast.stats()["cache_nbytes"] == nbytes


def test_contiguous_caches_are_copied():
    _, fast = make(backend="aten")
    a, b = fill(fast, 1, 9), fill(fast, 3, 20)
    wanted = [rows_of(b, 2, 20), rows_of(a, 0, 9), rows_of(b, 0, 5)]
    made = compose([CacheRow(b, 2, 20), CacheRow(a, 0, 9), CacheRow(b, 0, 5)], 22)
    assert made.get_seq_length() == 22
    assert all(is_row(made, i, w) for i, w in enumerate(wanted))
    assert not made.layers[1].keys[1, :, : 22 - 9].any()


@pytest.mark.parametrize("backend", ["auto", "aten"])
def test_empty_columns_before_a_prompt_change_nothing(backend):
    model, fast = make(**({} if backend == "auto" else {"backend": backend}))
    cache = blank_like(fill(fast, 1, 4), 2, 60)
    ids = torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.cat([torch.zeros(2, 60, dtype=torch.int64), torch.ones_like(ids)], 1)
    positions = torch.arange(7).expand(2, 7)
    with torch.no_grad():
        ours = fast(input_ids=ids, attention_mask=mask, position_ids=positions,
                    past_key_values=cache, use_cache=True).logits  # fmt: skip
        torch.testing.assert_close(ours, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == 67


def test_a_composed_cache_goes_on_like_the_rows_alone():
    model, fast = make()
    caches = [fill(fast, 1, n) for n in (4, 68)]
    made = compose([CacheRow(caches[0], 0, 4), CacheRow(caches[1], 0, 68)], 68)
    mask = torch.ones(2, 69, dtype=torch.int64)
    mask[0, :64] = 0
    ids, positions = torch.tensor([[5], [6]]), torch.tensor([[4], [68]])
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
    with pytest.raises(InputError, match=r"positions \[4\] .* cannot end at 9"):
        compose([CacheRow(a, 0, 4)], 9)
    other = fill(make(max_cache_nbytes=1 << 20)[1], 1, 4)
    with pytest.raises(InputError, match="same model"):
        compose([CacheRow(a, 0, 4), CacheRow(other, 0, 4)], 4)
