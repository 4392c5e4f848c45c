"""Block memory: a decoder's keys and values in blocks that batch rows, and caches, can share.

In: as for `CacheMemory`. Out: memory that does not move, and a block table, as read by
`ir/cache_ops.py`. A shared block is copied on write::

    memory.tensor_for(batch=2, length=65); memory.table()  ->  (24, 2, 2), offsets in elements
    memory.select(0, [1, 1])                               ->  both rows share one row's blocks
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch

from turbotx.errors import InputError
from turbotx.memory.cache_blocks import CacheBlocks, CacheBudget, Ids, can_have_blocks
from turbotx.runtime.cache_memory import BLOCK_LEN, CacheMemory, LayerShape, MemoryRow

CPU = torch.device("cpu")
SLACK = 64
"""Positions kept beyond a window, so that up to this many may be dropped again."""


def fits_blocks(shapes: Sequence[LayerShape], device: torch.device) -> bool:
    """Return whether a cache of these layers may lie in blocks: all of one size, where there are
    addresses that do not move."""
    sizes = {s.heads * (s.key_width + s.value_width) for s in shapes}
    return len(sizes) == 1 and 0 not in sizes and can_have_blocks(device)


class BlockMemory(CacheMemory):
    """Stores, for each layer, a table (batch, columns) of block ids for its keys and values. A cell
    is -1 if the block has left the window or was never written.

    windows: how many positions back a layer sees, its own included; None: all. least_columns: of
    the table; a program for a CPU takes one column for contiguous memory.
    """

    def __init__(
        self, shapes: Sequence[LayerShape], dtype: torch.dtype, budget: CacheBudget,
        device: torch.device = CPU, least_columns: int = 2,
    ) -> None:  # fmt: skip
        super().__init__(shapes, dtype, device, budget=budget)
        self.least_columns = least_columns
        self.windows: list[int | None] = [None] * len(self.shapes)

    def _start(self) -> None:
        self._used = Lock()
        self.tables: list[Ids] = [np.zeros((0, 0), np.int64) for _ in self.shapes]
        self._ready = 0
        """Positions for which every layer's rows are known to have exclusive blocks."""
        self._gone = [0] * len(self.shapes)
        """For each layer, the number of columns that have left its window and were freed."""
        self._open()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _open(self) -> None:
        """Open the blocks for the current layer shapes and dtype."""
        shape = self.shapes[0]
        self._size = BLOCK_LEN * shape.heads * (shape.key_width + shape.value_width)
        nbytes = self._size * self.dtype.itemsize
        self.blocks: CacheBlocks = self.budget.blocks_of(nbytes, self.device)
        self._flat = self.blocks.memory.view(self.dtype)
        self._parts = [(self._view(s, 0), self._view(s, 1)) for s in self.shapes]
        self._owner = weakref.finalize(self, _let_go, self.blocks, self.tables)
        self._owner.atexit = False

    def _view(self, shape: LayerShape, part: int) -> torch.Tensor:
        """Return a view of a layer's keys or values in all blocks, (blocks, heads, rows, width)."""
        width = (shape.key_width, shape.value_width)[part]
        first = shape.heads * BLOCK_LEN * shape.key_width * part
        size = len(self._flat) // self._size, shape.heads, BLOCK_LEN, width
        return self._flat.as_strided(size, (self._size, BLOCK_LEN * width, width, 1), first)

    def __getstate__(self) -> dict[str, Any]:
        held = [self.read(layer) for layer in range(len(self.shapes))]
        return {"made": self._made(), "windows": self.windows, "held": held}

    def _made(self) -> tuple[Any, ...]:
        return self.shapes, self.dtype, self.budget, self.device, self.least_columns

    def __setstate__(self, state: dict[str, Any]) -> None:
        BlockMemory.__init__(self, *state["made"])
        for layer, parts in enumerate(state["held"]):
            if parts is not None:
                self.put(layer, *parts)
        self.windows = state["windows"]

    def __deepcopy__(self, memo: Any) -> BlockMemory:
        made = BlockMemory(*self._made())
        for layer, table in enumerate(self.tables):
            self.blocks.share(table[table >= 0])
            made.tables[layer] = table.copy()
        made.lengths, made.windows = list(self.lengths), list(self.windows)
        made._gone, self._ready = list(self._gone), 0
        return made

    # --- contents ---

    @property
    def nbytes(self) -> int:
        """Bytes of its blocks, each counted once, including blocks shared with other caches."""
        ids = np.concatenate([t.ravel() for t in self.tables])
        return int(np.count_nonzero(np.unique(ids) >= 0)) * self.blocks.block_nbytes

    @property
    def capacity(self) -> int:
        """Number of positions that have blocks."""
        return self.tables[0].shape[1] * BLOCK_LEN

    def batch_of(self, layer: int) -> int | None:
        """Return the batch size of a layer, None if it is empty."""
        return len(self.tables[layer]) if self.tables[layer].size else None

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return copies of a layer's keys and values, (batch, heads, length, width); zeros where
        they have left the window."""
        return self._gather(layer, self.tables[layer]) if self.tables[layer].size else None

    def _gather(self, layer: int, table: Ids) -> tuple[torch.Tensor, torch.Tensor]:
        length, found = self.lengths[layer], []
        ids, gone = self._index(table.clip(0).ravel()), self._index(table.ravel() < 0)
        with torch.inference_mode(False), torch.no_grad():
            for part in self._parts[layer]:
                rows = part[ids]
                rows[gone] = 0
                wide = rows.view(*table.shape, *part.shape[1:]).transpose(1, 2).flatten(2, 3)
                found.append(wide[:, :, :length])
        return found[0], found[1]

    def tensor_for(self, batch: int, length: int) -> torch.Tensor:
        """Return the memory, (elements, batch, rows of a block), with exclusive blocks for `length`
        positions of each row from its end on; see `table`.

        Raises InputError if it holds another batch size; CacheFullError.
        """
        if self._ready < length or len(self.tables[0]) != batch:
            self.refuse_other(batch)
            first, end = self.length // BLOCK_LEN, -(-length // BLOCK_LEN)
            for layer in range(len(self.shapes)):
                self._widen(layer, batch, length)
            self._claim(range(len(self.shapes)), first, end)
            self._ready, self._table = end * BLOCK_LEN, self._make_table()
            size = len(self._flat) // (batch * BLOCK_LEN), batch, BLOCK_LEN
            self._whole = self._flat[: size[0] * batch * BLOCK_LEN].view(size)
        return self._whole

    def table(self) -> torch.Tensor:
        """Return the block table that goes with the result of `tensor_for`."""
        return self._table

    def _make_table(self) -> torch.Tensor:
        """Replace empty cells by a row's first block: masked reads then see finite numbers."""
        made = []
        for table, shape in zip(self.tables, self.shapes, strict=True):
            first = table[np.arange(len(table)), (table >= 0).argmax(axis=1)]
            places = np.where(table < 0, first[:, None], table) * self._size
            made += [places, places + shape.heads * BLOCK_LEN * shape.key_width]
        stacked = np.stack(made)
        # As many columns as a power of two: a CUDA graph is for one number of them.
        count = stacked.shape[2]
        more = max(self.least_columns, 1 << (count - 1).bit_length()) - count
        return self._index(np.pad(stacked, ((0, 0), (0, 0), (0, more)), mode="edge"))

    def _index(self, numbers: np.ndarray[Any, Any]) -> torch.Tensor:
        """Return numbers, or truths, on the device."""
        return torch.from_numpy(numbers).to(self.device)

    def contiguous(self) -> CacheMemory:
        """Return the same in contiguous memory with no room for more, which no budget counts."""
        made = CacheMemory(self.shapes, self.dtype, self.device, grows=False)
        for layer in range(len(self.shapes)):
            held = self.read(layer)
            if held is not None:
                made.put(layer, *held)
        return made

    def like(self) -> BlockMemory:
        """Return an empty memory for caches of the same kind."""
        made = BlockMemory(*self._made())
        made.windows = list(self.windows)
        return made

    def blank(self, batch: int, length: int, known: Ids | None = None) -> None:
        """Fill an empty memory with zeros, which use no blocks, or share `known` blocks of the
        first columns, (layers, batch, columns), -1 for none."""
        for layer in range(len(self.shapes)):
            self._widen(layer, batch, length)
            if known is not None:
                self.tables[layer][:, : known.shape[2]] = known[layer]
            self.lengths[layer] = length
        if known is not None:
            self.blocks.share(known[known >= 0])

    def gather(self, rows: Sequence[MemoryRow], length: int) -> None:
        """Fill an empty memory with rows, each ending at position `length`: their blocks are
        shared, and no keys or values move.

        Raises InputError where a row does not end at that place of a block, or lies in no blocks.
        """
        if any(getattr(row.memory, "blocks", None) is not self.blocks for row in rows):
            raise InputError("rows of a cache in blocks are taken from caches of the same model")
        ends = sorted({row.memory.length for row in rows})
        if any((end - length) % BLOCK_LEN for end in ends):
            raise InputError(
                f"rows that end at positions {ends} of caches cannot end at {length}: they lie in "
                f"blocks, and move by multiples of {BLOCK_LEN}"
            )
        columns = -(-length // BLOCK_LEN)
        for layer in range(len(self.shapes)):
            table = np.full((len(rows), columns), -1)
            for place, row in enumerate(rows):
                memory, end = row.memory, -(-row.memory.length // BLOCK_LEN)
                assert isinstance(memory, BlockMemory)
                cells = memory.tables[layer][
                    row.row, (memory.length - row.count) // BLOCK_LEN : end
                ]
                table[place, columns - len(cells) :] = cells
            self.blocks.share(table[table >= 0])
            self.tables[layer], self.lengths[layer] = table, length

    def count_new(self, batch: int, length: int) -> int:
        """Return how many blocks `tensor_for` takes."""
        if self._ready >= length and len(self.tables[0]) == batch:
            return 0
        first, end = self.length // BLOCK_LEN, -(-length // BLOCK_LEN)
        cells, known = batch * (end - first), (table[:, first:end] for table in self.tables)
        return sum(cells - ids.size + int(self.blocks.find_shared(ids).sum()) for ids in known)

    # --- blocks ---

    def _widen(self, layer: int, batch: int, length: int) -> None:
        """Extend a layer's table to `length` positions, without blocks."""
        table = self.tables[layer]
        if len(table) != batch:  # nothing is stored
            self.clear(layer)
            table = np.zeros((batch, 0), np.int64)
        columns = -(-length // BLOCK_LEN)
        if columns > table.shape[1]:
            wide = np.full((batch, columns), -1, np.int64)
            wide[:, : table.shape[1]] = table
            table = wide
        self.tables[layer] = table

    def _claim(self, layers: Sequence[int], first: int, end: int) -> None:
        """Make the blocks in columns first to end exclusive, allocating where necessary.

        The contents of the first column are kept, copied if the block was shared.
        """
        found = [self.tables[layer][:, first:end] for layer in layers]
        shared = [self.blocks.find_shared(ids) for ids in found]
        new = np.split(
            self.blocks.take(sum(int(s.sum()) for s in shared)),
            np.cumsum([s.sum() for s in shared])[:-1],
        )
        for layer, ids, where, own in zip(layers, found, shared, new, strict=True):
            if not len(own):
                continue
            made = ids.copy()
            made[where] = own
            moved, filled = where[:, 0], self.lengths[layer] - first * BLOCK_LEN
            if filled > 0 and moved.any():
                to, of = (self._index(x[moved, 0]) for x in (made, ids.clip(0)))
                none = self._index(made[moved & (ids[:, 0] < 0), 0])
                with torch.inference_mode(False), torch.no_grad():
                    for part in self._parts[layer]:
                        part[to, :, :filled] = part[of, :, :filled]
                        part[none, :, :filled] = 0
            old = ids[where]
            self.tables[layer][:, first:end] = made
            self.blocks.release(old[old >= 0])

    # --- updates ---

    def advance(self, count: int) -> None:
        """Record that a program has appended `count` rows to every layer; free blocks that left a
        layer's window, and merge equal blocks of several rows of a prompt."""
        begin = self.length
        super().advance(count)
        self.blocks.note_use()
        for layer, window in enumerate(self.windows if any(self.windows) else ()):
            gone = 0 if window is None else (self.lengths[layer] - window + 1 - SLACK) // BLOCK_LEN
            if gone > self._gone[layer]:
                self._let_go(layer, slice(None), slice(0, gone))
                self._gone[layer] = gone
        first, end = -(-begin // BLOCK_LEN), self.length // BLOCK_LEN
        if first < end and count >= BLOCK_LEN and len(self.tables[0]) > 1:
            self._merge(first, end)

    def _let_go(self, layer: int, rows: slice, columns: slice) -> None:
        cells = self.tables[layer][rows, columns]
        old = cells[cells >= 0]
        cells[:] = -1
        self.blocks.release(old)

    def _merge(self, first: int, end: int) -> None:
        """Share the blocks of neighbouring rows that hold the same bytes, as rows of one prompt
        do."""
        stacked = np.stack([table[:, first:end] for table in self.tables])
        above, below = stacked[:, :-1], stacked[:, 1:]
        apart = (above != below) & (above >= 0) & (below >= 0)
        places, a, b = np.argwhere(apart), above[apart], below[apart]
        key_nbytes = self.shapes[0].key_width * self.dtype.itemsize
        equal = self.blocks.find_equal(self._index(a), self._index(b), key_nbytes)
        for layer, row, column in places[equal]:
            cells = self.tables[layer][row : row + 2, first + column]
            self.blocks.share(cells[:1])
            self.blocks.release(cells[1:].copy())
            cells[1] = cells[0]
        self._ready = 0

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor, start: int = 0) -> None:
        """Store rows of a layer at position `start`; they become its last ones.

        keys, values: (batch, heads, rows, width). Raises InputError if they do not fit.
        """
        self.refuse_shapes(layer, keys, values)
        if not any(self.lengths) and keys.dtype != self.dtype:  # the model was converted meanwhile
            for k in range(len(self.shapes)):
                self.clear(k)
            self._owner.detach()
            self.dtype = keys.dtype
            self._open()
        batch, end = len(keys), start + keys.shape[2]
        held = self.batch_of(layer)
        if start and held not in (None, batch):
            raise InputError(f"a key/value cache holds a batch of {held}, and is given {batch}")
        self.drop(layer, max(0, self.lengths[layer] - start))
        self._widen(layer, batch, end)
        self._claim([layer], start // BLOCK_LEN, -(-end // BLOCK_LEN))
        self._write(layer, np.arange(batch), keys, values, start)
        self.lengths[layer], self._ready = end, 0

    def free_row(self, row: int) -> None:
        """Free the blocks of a finished row; it reads as zeros."""
        for layer in range(len(self.shapes)):
            self._let_go(layer, slice(row, row + 1), slice(None))
        self._ready = 0

    def _write(
        self, layer: int, rows: Ids, keys: torch.Tensor, values: torch.Tensor, start: int
    ) -> None:
        position, end = start, start + keys.shape[2]
        with torch.inference_mode(False), torch.no_grad():
            while position < end:
                column, first = divmod(position, BLOCK_LEN)
                until = min(end, (column + 1) * BLOCK_LEN)
                ids = self._index(self.tables[layer][rows, column])
                for part, given in zip(self._parts[layer], (keys, values), strict=True):
                    new = given[:, :, position - start : until - start].to(self.dtype)
                    part[ids, :, first : first + until - position] = new
                position = until

    def select(self, layer: int, rows: torch.Tensor) -> None:
        """Select rows of a layer's batch by index; repeated rows share blocks until one of them is
        written."""
        old = self.tables[layer]
        if not self.lengths[layer]:
            return
        new = old[np.arange(len(old))[rows.cpu().numpy()]]
        self.blocks.share(new[new >= 0])
        self.tables[layer] = new
        self.blocks.release(old[old >= 0])
        self._ready = 0

    def drop(self, layer: int, count: int) -> None:
        """Drop the last `count` positions of a layer.

        Raises InputError if positions that would be visible in its window again have been freed.
        """
        length = max(0, self.lengths[layer] - count)
        kept, window = -(-length // BLOCK_LEN), self.windows[layer]
        shown = max(0, length - (window or 0) + 1) // BLOCK_LEN
        if window is not None and length and self._gone[layer] > shown:
            raise InputError(
                f"layer {layer} of a key/value cache sees {window} positions, and some of those "
                f"before position {length} have been let go: drop no more than {SLACK} positions"
            )
        self._gone[layer] = min(self._gone[layer], kept)
        self._let_go(layer, slice(None), slice(kept, None))
        self.tables[layer] = self.tables[layer][:, :kept]
        self.lengths[layer], self._ready = length, min(self._ready, kept * BLOCK_LEN)

    def clear(self, layer: int) -> None:
        """Drop all of a layer, including its memory."""
        self._let_go(layer, slice(None), slice(None))
        self._gone[layer] = 0
        self.tables[layer], self.lengths[layer] = np.zeros((0, 0), np.int64), 0
        self._ready = 0


def _let_go(blocks: CacheBlocks, tables: list[Ids]) -> None:
    for table in tables:
        blocks.release(table[table >= 0])
