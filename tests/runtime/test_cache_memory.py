"""Cache memory: rows stay what they are when it grows, is reordered, or its layers lie apart."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from turbotx.errors import CacheFullError, InputError
from turbotx.memory.cache_blocks import CacheBudget
from turbotx.runtime.cache_memory import LEAST_CAPACITY, CacheMemory, LayerShape

SHAPES = [LayerShape(2, 4, 4), LayerShape(1, 8, 3)]


def filled(batch=2, length=5, **options):
    """Return a memory and what its layers hold."""
    memory = CacheMemory(SHAPES, torch.float32, torch.device("cpu"), **options)
    held = [
        (torch.randn(batch, s.heads, length, s.key_width),
         torch.randn(batch, s.heads, length, s.value_width))
        for s in SHAPES
    ]  # fmt: skip
    for layer, (keys, values) in enumerate(held):
        memory.put(layer, keys, values)
    return memory, held


def assert_holds(memory, held) -> None:
    for layer, parts in enumerate(held):
        for ours, theirs in zip(memory.read(layer), parts, strict=True):
            assert torch.equal(ours, theirs)


def test_layers_are_brought_together_and_grow_by_doubling() -> None:
    memory, held = filled()
    tensor = memory.tensor_for(2, 6)
    assert tensor.shape == (2 * 8 + 11, 2, LEAST_CAPACITY) and tensor.is_contiguous()
    assert memory.tensor_for(2, LEAST_CAPACITY) is tensor
    assert memory.tensor_for(2, LEAST_CAPACITY + 1).shape[2] == 2 * LEAST_CAPACITY
    assert_holds(memory, held)
    assert memory.length == 5


def test_a_length_that_stays_has_no_room_beyond_it() -> None:
    memory, held = filled(grows=False)
    assert memory.tensor_for(2, 5).shape[2] == 5
    assert_holds(memory, held)


def test_what_lies_beyond_a_length_is_not_shown() -> None:
    memory, _ = filled()
    memory.tensor_for(2, 9).fill_(7.0)
    assert memory.read(0)[0].shape[2] == 5
    memory.advance(2)
    assert (memory.read(1)[1][:, :, 5:] == 7.0).all() and memory.length == 7
    memory.drop(0, 3)
    with pytest.raises(InputError, match=r"different lengths, \[4, 7\]"):
        memory.length  # noqa: B018


@pytest.mark.parametrize("rows", [[1, 0], [1, 1], [0], [1, 0, 0, 1]])
def test_rows_of_the_batch_are_chosen(rows: list[int]) -> None:
    memory, held = filled()
    memory.tensor_for(2, 6)
    for layer in range(len(SHAPES)):
        memory.select(layer, torch.tensor(rows))
    held = [tuple(part[rows] for part in parts) for parts in held]
    assert_holds(memory, held)
    memory.tensor_for(len(rows), 6)
    assert_holds(memory, held)


def test_rows_that_share_their_first_positions_are_chosen_again_and_again() -> None:
    generator = torch.Generator().manual_seed(0)
    for batch in (2, 4):
        memory, held = filled(batch)
        for _ in range(40):
            kind = int(torch.randint(5, (), generator=generator))
            length = held[0][0].shape[2]
            if kind < 3:
                rows = torch.randint(batch, (batch,), generator=generator)
                held = [tuple(part[rows] for part in parts) for parts in held]
                for layer in range(len(SHAPES)):
                    memory.select(layer, rows)
            elif kind == 3 and length > 2:
                held = [tuple(part[:, :, :-2] for part in parts) for parts in held]
                for layer in range(len(SHAPES)):
                    memory.drop(layer, 2)
            else:
                more = [tuple(torch.randn_like(p[:, :, :2]) for p in parts) for parts in held]
                for layer, (keys, values) in enumerate(more):
                    memory.put(layer, keys, values, length)
                pairs = zip(held, more, strict=True)
                held = [tuple(map(join, old, new)) for old, new in pairs]
            memory.tensor_for(batch, held[0][0].shape[2])
            assert_holds(memory, held)


def join(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return torch.cat([old, new], 2)


def test_what_rows_share_is_not_copied_again() -> None:
    memory, held = filled(length=9)
    rows = torch.tensor([1, 1])
    memory.select(0, rows)
    memory.read(0)[0][0, :, :9] = 7.0  # both rows are known to be alike: nobody reads this again
    memory.put(0, *(part[:, :, :1] for part in held[0]), 9)
    memory.select(0, rows)
    keys = memory.read(0)[0]
    assert (keys[0, :, :9] == 7.0).all() and torch.equal(keys[0, :, 9:], keys[1, :, 9:])


def test_bytes_are_counted_and_bounded() -> None:
    position = (2 * 8 + 11) * 4
    budget = CacheBudget(2 * 128 * position)
    memory, held = filled(budget=budget)
    memory.tensor_for(2, 6)
    assert memory.nbytes == budget.nbytes == 2 * LEAST_CAPACITY * position
    other = copy.deepcopy(memory)
    assert budget.nbytes == memory.nbytes + 2 * 5 * position
    with pytest.raises(CacheFullError, match="max_cache_nbytes"):
        memory.tensor_for(2, LEAST_CAPACITY + 1)
    assert_holds(memory, held)
    del other
    assert budget.nbytes == memory.nbytes
    assert pickle.loads(pickle.dumps(memory)).nbytes == 2 * 5 * position
    for layer in range(len(SHAPES)):
        memory.clear(layer)
    assert memory.nbytes == budget.nbytes == 0 and budget.peak_nbytes > 0


def test_a_bound_lets_a_cache_grow_by_less_than_to_twice_its_size() -> None:
    memory, _ = filled(budget=CacheBudget(2 * 5 * 64 * (2 * 8 + 11) * 4))
    memory.tensor_for(2, 2 * LEAST_CAPACITY)
    assert memory.tensor_for(2, 2 * LEAST_CAPACITY + 1).shape[2] == 3 * LEAST_CAPACITY


def test_a_copy_is_its_own() -> None:
    memory, held = filled()
    memory.tensor_for(2, 6)
    other = copy.deepcopy(memory)
    memory.tensor_for(2, 6).zero_()
    assert_holds(other, held)
    assert other.tensor_for(2, 6)[:, :, :].any()


def test_what_does_not_fit_is_refused() -> None:
    memory, _ = filled()
    with pytest.raises(InputError, match="holds a batch of 2, and the call has 3"):
        memory.tensor_for(3, 6)
    with pytest.raises(InputError, match="layer 1 of a key/value cache takes"):
        memory.put(1, torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 3))
    with memory.owned(), pytest.raises(InputError, match="two threads"), memory.owned():
        pass
    with memory.owned():
        pass
