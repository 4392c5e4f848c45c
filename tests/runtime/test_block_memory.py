"""Block memory beside dense tensors: what rows hold, what they share, and what is let go."""

from __future__ import annotations

import copy
import gc
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.memory.cache_blocks_check import check_blocks
from turbotx.errors import CacheFullError, InputError
from turbotx.memory.cache_blocks import CacheBudget
from turbotx.runtime.block_memory import BLOCK_LEN, SLACK, BlockMemory, fits_blocks
from turbotx.runtime.cache_memory import LayerShape

SHAPES = (LayerShape(2, 4, 2), LayerShape(1, 8, 4))
POSITION = 2 * 12 * 4


def make(budget=None):
    return BlockMemory(SHAPES, torch.float32, budget or CacheBudget())


def drawn(batch, count):
    return [
        (torch.randn(batch, s.heads, count, s.key_width),
         torch.randn(batch, s.heads, count, s.value_width))
        for s in SHAPES
    ]  # fmt: skip


def step(memory, held, batch, count):
    """Write `count` positions as a program does: by the table. Return what is held then."""
    length = memory.length + count
    flat = memory.tensor_for(batch, length).view(-1)
    table, new = memory.table(), drawn(batch, count)
    assert table.shape[:2] == (2 * len(SHAPES), batch) and table.shape[2] > 1
    for layer, shape in enumerate(SHAPES):
        for part, width in enumerate((shape.key_width, shape.value_width)):
            for row in range(batch):
                for k in range(count):
                    column, at = divmod(memory.length + k, BLOCK_LEN)
                    place = int(table[2 * layer + part, row, column])
                    size = (shape.heads, BLOCK_LEN, width)
                    block = flat[place : place + np.prod(size)].view(size)
                    block[:, at] = new[layer][part][row, :, k]
    memory.advance(count)
    return [tuple(map(join, old, more)) for old, more in zip(held, new, strict=True)]


def join(old, new):
    return torch.cat([old, new], 2)


def assert_holds(memory, held) -> None:
    for layer, parts in enumerate(held):
        for ours, theirs in zip(memory.read(layer), parts, strict=True):
            assert torch.equal(ours, theirs)


def live(*memories):
    """Check references of all of them; return the blocks that live positions need at the most."""
    check_blocks(memories[0].blocks, [t for m in memories for t in m.tables])
    return sum(
        len(t) * -(-n // BLOCK_LEN)
        for m in memories for t, n in zip(m.tables, m.lengths, strict=True)
    )  # fmt: skip


def test_rows_are_written_by_the_table_and_take_whole_blocks() -> None:
    memory, held = make(), drawn(2, 0)
    for count in (5, 1, 58, 1, 130):
        held = step(memory, held, 2, count)
        assert_holds(memory, held)
        assert memory.blocks.used == live(memory)
        assert memory.nbytes == memory.budget.nbytes == memory.blocks.used * 64 * 12 * 4
    assert memory.length == 195 and memory.capacity == 256
    assert_holds(memory.contiguous(), held)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(
    ["step", "long", "select", "fork", "drop", "put", "copy", "let go"]), st.integers(0, 10**6)),
    max_size=12))  # fmt: skip
def test_any_order_of_changes_leaves_what_dense_tensors_hold(changes) -> None:
    budget = CacheBudget()
    memory, held = make(budget), drawn(2, 0)
    held = step(memory, held, 2, 3)
    others = []
    for kind, seed in changes:
        batch, length = held[0][0].shape[0], held[0][0].shape[2]
        generator = torch.Generator().manual_seed(seed)
        if kind in ("step", "long") or length == 0:
            held = step(memory, held, batch, 1 if kind == "step" else 70)
        elif kind in ("select", "fork"):
            count = batch if kind == "select" else 1 + seed % 4
            rows = torch.randint(batch, (count,), generator=generator)
            held = [tuple(part[rows] for part in parts) for parts in held]
            for layer in range(len(SHAPES)):
                memory.select(layer, rows)
        elif kind == "drop":
            count = seed % (length + 1)
            held = [tuple(part[:, :, : length - count] for part in parts) for parts in held]
            for layer in range(len(SHAPES)):
                memory.drop(layer, count)
        elif kind == "put":
            start, more = seed % (length + 1), drawn(batch, 3)
            held = [
                tuple(join(a[:, :, :start], b) for a, b in zip(old, new, strict=True))
                for old, new in zip(held, more, strict=True)
            ]
            for layer, (keys, values) in enumerate(more):
                memory.put(layer, keys, values, start)
        elif kind == "copy":
            others.append((copy.deepcopy(memory), held))
        elif others:
            others.pop(seed % len(others))
        if held[0][0].shape[2]:
            assert_holds(memory, held)
        for other, its in others:
            if its[0][0].shape[2]:
                assert_holds(other, its)
        other = None  # one that was let go is not held by the loop
        assert memory.blocks.used <= live(memory, *(o for o, _ in others))
    blocks = memory.blocks
    others.clear()
    del memory
    gc.collect()
    assert blocks.used == budget.nbytes == 0


def test_a_step_of_beams_copies_at_most_one_block_a_forked_beam() -> None:
    memory, held = make(), drawn(4, 0)
    held = step(memory, held, 4, 200)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        rows = torch.randint(4, (4,), generator=generator)
        before = memory.blocks.used
        for layer in range(len(SHAPES)):
            memory.select(layer, rows)
        held = [tuple(part[rows] for part in parts) for parts in held]
        shared = memory.blocks.used
        assert shared <= before
        forked = 4 - len(set(rows.tolist()))
        new_column = 4 * (memory.length % BLOCK_LEN == 0)
        held = step(memory, held, 4, 1)
        assert memory.blocks.used - shared <= len(SHAPES) * max(forked, new_column)
    assert_holds(memory, held)
    live(memory)


def test_a_permutation_of_beams_takes_no_blocks() -> None:
    memory, held = make(), drawn(3, 0)
    held = step(memory, held, 3, 70)
    used, tables = memory.blocks.used, [set(t.ravel()) for t in memory.tables]
    for layer in range(len(SHAPES)):
        memory.select(layer, torch.tensor([2, 0, 1]))
    step(memory, held, 3, 1)
    assert memory.blocks.used == used and tables == [set(t.ravel()) for t in memory.tables]


def test_rows_of_one_prompt_share_its_whole_blocks() -> None:
    memory = make()
    flat = memory.tensor_for(3, 130).view(-1)
    table, one = memory.table(), [torch.randn(BLOCK_LEN * 16) for _ in range(3)]
    for places in table[::2, :, :3].reshape(-1, 3):
        for place, held in zip(places.tolist(), one, strict=True):
            flat[place : place + BLOCK_LEN * 12] = held[: BLOCK_LEN * 12]
    other = int(table[2, 2, 1])
    flat[other + 100] += 1
    memory.advance(130)
    live(memory)
    # Two whole blocks once, one that differs in a row, and a last one that is not whole.
    assert memory.blocks.used == 2 * 2 + 1 + 2 * 3
    rows = memory.read(0)[0]
    assert torch.equal(rows[0], rows[2])


def test_what_left_the_window_is_let_go_and_a_few_positions_may_be_dropped() -> None:
    memory, held = make(), drawn(2, 0)
    memory.windows = [10, None]
    for _ in range(30):
        held = step(memory, held, 2, 30)
    most = (10 + SLACK) // BLOCK_LEN + 2
    assert (memory.tables[0] >= 0).sum(1).max() <= most
    live(memory)
    keys, full = memory.read(0)[0], memory.read(1)[0]
    assert torch.equal(keys[:, :, -10:], held[0][0][:, :, -10:]) and not keys[:, :, :64].any()
    assert torch.equal(full, held[1][0])
    assert (memory.table() >= 0).all()
    memory.drop(0, SLACK)
    with pytest.raises(InputError, match="have been let go"):
        memory.drop(0, 3 * SLACK)


def test_a_cache_shorter_than_its_window_may_be_dropped_from() -> None:
    memory, held = make(), drawn(2, 0)
    memory.windows = [10, 10]
    held = step(memory, held, 2, 6)
    for layer in range(len(SHAPES)):
        memory.drop(layer, 2)
    assert_holds(memory, [tuple(part[:, :, :4] for part in parts) for parts in held])


def test_no_rows_are_refused() -> None:
    with pytest.raises(InputError, match="a batch of 0"):
        make().tensor_for(0, 3)


def test_a_batch_is_told_what_it_takes() -> None:
    memory = make()
    for batch, length in ((2, 60), (2, 64), (2, 65), (2, 200)):
        before, told = memory.blocks.used, memory.count_new(batch, length)
        memory.tensor_for(batch, length)
        assert memory.blocks.used - before == told
        memory.advance(length - memory.length)
    for layer in range(len(SHAPES)):
        memory.select(layer, torch.tensor([0, 0, 1]))
    before, told = memory.blocks.used, memory.count_new(3, 201)
    memory.tensor_for(3, 201)
    assert memory.blocks.used - before == told == 2


def test_a_bound_is_kept_and_what_was_held_stays() -> None:
    budget = CacheBudget(2 * BLOCK_LEN * POSITION)
    memory = make(budget)
    held = step(memory, drawn(2, 0), 2, 60)
    with pytest.raises(CacheFullError, match="max_cache_nbytes"):
        memory.tensor_for(2, 65)
    assert memory.length == 60 and budget.nbytes == 2 * BLOCK_LEN * POSITION
    held = step(memory, held, 2, 4)
    assert_holds(memory, held)
    other = copy.deepcopy(memory)
    assert budget.nbytes == 2 * BLOCK_LEN * POSITION
    memory.clear(0)
    memory.clear(1)
    assert_holds(other, held)


def test_copies_by_pickle_hold_the_same() -> None:
    memory = make()
    held = step(memory, drawn(1, 0), 1, 70)
    made = pickle.loads(pickle.dumps(memory))
    assert_holds(made, held)
    assert made.length == 70 and made.budget is not memory.budget


def test_a_model_that_was_converted_goes_on_in_other_blocks() -> None:
    memory = make()
    step(memory, drawn(1, 0), 1, 3)
    blocks = memory.blocks
    memory.clear(0)
    memory.clear(1)
    for layer, (keys, values) in enumerate(drawn(1, 3)):
        memory.put(layer, keys.bfloat16(), values.bfloat16())
    assert memory.blocks is not blocks and blocks.used == 0 and memory.read(0)[0].dtype is (
        torch.bfloat16
    )  # fmt: skip


def test_layers_of_several_sizes_are_not_for_blocks() -> None:
    cpu = torch.device("cpu")
    assert fits_blocks(SHAPES, cpu)
    assert not fits_blocks([LayerShape(2, 4, 4), LayerShape(1, 4, 4)], cpu)
    assert not fits_blocks(SHAPES, torch.device("cuda"))


def test_a_thousand_caches_of_random_lengths_leave_no_block() -> None:
    budget, random = CacheBudget(), np.random.default_rng(0)
    blocks, running = make(budget).blocks, []
    for _ in range(1000):
        memory = make(budget)
        memory.tensor_for(int(random.integers(1, 4)), int(random.integers(1, 400)))
        running.append(memory)
        if random.random() < 0.5:
            running.append(copy.deepcopy(memory))
        while running and random.random() < 0.7:
            running.pop(int(random.integers(len(running))))
    check_blocks(blocks, [t for m in running for t in m.tables] + list(memory.tables))
    running.clear()
    del memory
    assert blocks.used == budget.nbytes == 0 and budget.peak_nbytes > 0
