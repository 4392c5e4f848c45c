"""Cache memory: the keys and values of all layers of a decoder, in one growing tensor.

In: the heads and widths of every layer; rows, or the new length after a program has written rows.
Out: the tensor that programs take, and its filled part::

    memory = CacheMemory([LayerShape(12, 64, 64)] * 12, torch.float32, torch.device("cpu"))
    memory.tensor_for(batch=2, length=33)  ->  (18432, 2, 64), doubled when full
    memory.read(0)                         ->  keys and values, (2, 12, 33, 64), views
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from turbotx.errors import InputError
from turbotx.ir.cache_ops import block_of
from turbotx.memory.cache_blocks import CacheBudget

BLOCK_LEN = 64
"""Positions of a block."""
LEAST_CAPACITY = 64
"""Initial capacity in positions. It doubles when exceeded, or grows to the next multiple of this if
doubling exceeds the budget."""


@dataclass(frozen=True)
class LayerShape:
    """The size of one position of a layer: `heads` keys and values of these widths."""

    heads: int
    key_width: int
    value_width: int


@dataclass(frozen=True)
class MemoryRow:
    """The last `count` positions of a row of a memory."""

    memory: CacheMemory
    row: int
    count: int


def make_table(layers: int, memory: torch.Tensor) -> torch.Tensor:
    """Return the block table of contiguous memory, see `ir/cache_ops.py`."""
    shape = 2 * layers, memory.shape[1], 1
    return torch.zeros(shape, dtype=torch.int64, device=memory.device)


class CacheMemory:
    """Keys and values of every layer.

    lengths: number of filled positions of each layer. If layers were given another batch size one
    by one, they are stored separately until `tensor_for`.
    """

    def __init__(
        self, shapes: Sequence[LayerShape], dtype: torch.dtype, device: torch.device,
        grows: bool = True, budget: CacheBudget | None = None,
    ) -> None:  # fmt: skip
        """grows: False for a fixed length, without spare capacity. budget: counts its bytes."""
        self.shapes, self.dtype, self.device = tuple(shapes), dtype, device
        self.grows = grows
        self.lengths = [0] * len(self.shapes)
        self._tensor: torch.Tensor | None = None
        self._blocks: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(self.shapes)
        self._shared: list[np.ndarray | None] = [None] * len(self.shapes)
        """For each layer, how many leading positions two rows of the batch are known to share."""
        self.budget = budget or CacheBudget()
        self._start()

    def _start(self) -> None:
        self._used = threading.Lock()
        counted = self._counted = [0]
        weakref.finalize(self, lambda budget: budget.add(-counted[0]), self.budget).atexit = False
        self._count()

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k not in ("_used", "_counted")}
        held = [self.read(layer) for layer in range(len(self.shapes))]
        apart = [None if x is None else (x[0].clone(), x[1].clone()) for x in held]
        return {**state, "_tensor": None, "_blocks": apart}  # only the filled part

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Claim the memory for this thread inside the context.

        Raises InputError if another thread is using it.
        """
        if not self._used.acquire(blocking=False):
            raise InputError(
                "two threads use one key/value cache at once: give each thread a cache of its own"
            )
        try:
            yield
        finally:
            self._used.release()

    # --- contents ---

    @property
    def length(self) -> int:
        """Number of positions of every layer.

        Raises InputError if layers differ, as after `update` of some of them.
        """
        if len(set(self.lengths)) > 1:
            raise InputError(
                f"the layers of a key/value cache have different lengths, {self.lengths}: a call "
                "of the whole model needs them equal"
            )
        return self.lengths[0]

    @property
    def position_nbytes(self) -> int:
        """Bytes per position of one sequence."""
        return sum(s.heads * (s.key_width + s.value_width) for s in self.shapes) * (
            self.dtype.itemsize
        )

    @property
    def nbytes(self) -> int:
        """Bytes allocated, spare capacity included."""
        return self._counted[0]

    @property
    def capacity(self) -> int:
        """Number of positions that fit in the memory."""
        return 0 if self._tensor is None else self._tensor.shape[2]

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return views of a layer's keys and values, (batch, heads, length, width); None if it is
        empty."""
        held, length = self._blocks[layer], self.lengths[layer]
        return None if held is None else (held[0][:, :, :length], held[1][:, :, :length])

    def batch_of(self, layer: int) -> int | None:
        """Return the batch size of a layer, None if it is empty."""
        held = self._blocks[layer]
        return None if held is None else held[0].shape[0]

    def contiguous(self) -> CacheMemory:
        """Return the contents in contiguous memory: itself."""
        return self

    def like(self) -> CacheMemory:
        """Return an empty memory for caches of the same kind."""
        return CacheMemory(self.shapes, self.dtype, self.device, budget=self.budget)

    def blank(self, batch: int, length: int) -> None:
        """Fill an empty memory with zeros."""
        self.tensor_for(batch, length)
        self.advance(length)

    def gather(self, rows: Sequence[MemoryRow], length: int) -> None:
        """Fill an empty memory with copies of rows, each ending at position `length`."""
        self.blank(len(rows), length)
        with torch.inference_mode(False), torch.no_grad():
            for layer in range(len(self.shapes)):
                for place, row in enumerate(rows):
                    first, held = row.memory.length - row.count, row.memory.read(layer)
                    for to, of in zip(self.read(layer) or (), held or (), strict=True):
                        to[place, :, length - row.count :] = of[row.row, :, first:]

    def count_new(self, batch: int, length: int) -> int:
        """Return how many blocks, of `BLOCK_LEN` positions of a layer, `tensor_for` takes."""
        more = -(-length // BLOCK_LEN) + self.length // -BLOCK_LEN
        return batch * more * len(self.shapes)

    @property
    def block_nbytes(self) -> int:
        """What a block takes, on average of the layers."""
        return BLOCK_LEN * self.position_nbytes // len(self.shapes)

    def refuse_other(self, batch: int) -> None:
        """Raise InputError for a batch of 0, or if it holds another batch size."""
        if batch == 0:
            raise InputError("a call with a key/value cache has a batch of 0: it needs a row")
        held = {self.batch_of(k) for k, n in enumerate(self.lengths) if n}
        other = held - {batch, None}
        if other:
            raise InputError(
                f"a key/value cache holds a batch of {other.pop()}, and the call has {batch}: "
                "give it a new cache, or change its batch by batch_select_indices or "
                "batch_repeat_interleave"
            )

    def tensor_for(self, batch: int, length: int) -> torch.Tensor:
        """Return the memory with capacity for `length` positions: (elements per position, batch,
        capacity), dense.

        Raises InputError if it holds another batch size.
        """
        self.refuse_other(batch)
        made: Any = self._tensor
        fits = made is not None and made.shape[1] == batch
        if not self.grows:
            return made if fits and self.capacity == length else self._move(batch, length)
        if not fits or self.capacity < length:
            capacity = max(LEAST_CAPACITY, self.capacity)
            while capacity < length:
                capacity *= 2
            if not self.budget.has_room(batch * capacity * self.position_nbytes):
                capacity = -(-length // LEAST_CAPACITY) * LEAST_CAPACITY
            return self._move(batch, capacity)
        return made

    def table(self) -> torch.Tensor:
        """Return the block table that goes with the result of `tensor_for`."""
        return self._table

    def _move(self, batch: int, capacity: int) -> torch.Tensor:
        size = self.position_nbytes // self.dtype.itemsize
        self._reserve(batch * capacity * self.position_nbytes)
        with torch.inference_mode(False), torch.no_grad():
            made = torch.zeros(size, batch, capacity, dtype=self.dtype, device=self.device)
            place, blocks = 0, list[tuple[torch.Tensor, torch.Tensor] | None]()
            for layer, shape in enumerate(self.shapes):
                keys = block_of(made, place, shape.heads, shape.key_width)
                place += shape.heads * shape.key_width
                values = block_of(made, place, shape.heads, shape.value_width)
                place += shape.heads * shape.value_width
                before, length = self.read(layer), self.lengths[layer]
                if before is not None and length:
                    keys[:, :, :length] = before[0]
                    values[:, :, :length] = before[1]
                blocks.append((keys, values))
        self._tensor, self._blocks = made, blocks
        self._table = make_table(len(self.shapes), made)
        self._count()
        return made

    def _reserve(self, nbytes: int) -> None:
        """Count memory about to be allocated in addition to the present one."""
        self.budget.add(nbytes)
        self._counted[0] += nbytes

    def _count(self) -> None:
        """Recount after memory was freed."""
        held = [part for block in self._blocks if block is not None for part in block]
        storages = [x.untyped_storage() for x in held]
        nbytes = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
        self.budget.add(nbytes - self._counted[0])
        self._counted[0] = nbytes

    # --- updates ---

    def advance(self, count: int) -> None:
        """Record that a program has appended `count` rows to every layer."""
        self.lengths = [n + count for n in self.lengths]

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor, start: int = 0) -> None:
        """Store rows of a layer at position `start`; they become its last ones.

        keys, values: (batch, heads, rows, width). Raises InputError if they do not fit.
        """
        self.refuse_shapes(layer, keys, values)
        if not any(self.lengths) and keys.dtype != self.dtype:  # the model was converted meanwhile
            self.dtype, self._tensor = keys.dtype, None
            self._blocks = [None] * len(self.shapes)
        shared = self._shared[layer]
        self._shared[layer] = None if shared is None else np.minimum(shared, start)
        held, end = self._blocks[layer], start + keys.shape[2]
        with torch.inference_mode(False), torch.no_grad():
            room = 0 if held is None else held[0].shape[2]
            if held is None or held[0].shape[0] != keys.shape[0] or room < end:
                before, wide = self.read(layer), keys.shape[3] + values.shape[3]
                rows = keys.shape[0] * keys.shape[1] * max(end, 2 * room)
                self._reserve(rows * wide * self.dtype.itemsize)
                apart = [
                    x.new_zeros(x.shape[0], x.shape[1], max(end, 2 * room), x.shape[3],
                                dtype=self.dtype, device=self.device)
                    for x in (keys, values)
                ]  # fmt: skip
                for new, old in zip(apart, before or (), strict=bool(before)):
                    new[:, :, :start] = old[:, :, :start]
                held = self._place_apart(layer, apart[0], apart[1])
            held[0][:, :, start:end] = keys
            held[1][:, :, start:end] = values
        self.lengths[layer] = end

    def refuse_shapes(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Raise InputError if keys and values do not have a layer's heads and widths."""
        shape = self.shapes[layer]
        wanted = (shape.heads, shape.key_width), (shape.heads, shape.value_width)
        if any((x.shape[1], x.shape[3]) != w for x, w in zip((keys, values), wanted, strict=True)):
            raise InputError(
                f"layer {layer} of a key/value cache takes {shape}, and is given keys "
                f"{tuple(keys.shape)} and values {tuple(values.shape)}"
            )

    def free_row(self, row: int) -> None:
        """Do nothing: contiguous memory cannot free single rows."""

    def select(self, layer: int, rows: torch.Tensor) -> None:
        """Select rows of a layer's batch by index.

        Positions that a row is known to share with the row it replaces are not copied: beams share
        all but their latest tokens. rows: (rows kept,) integers, on any device.
        """
        held, length = self._blocks[layer], self.lengths[layer]
        if held is None or not length:
            return
        batch = held[0].shape[0]
        shared = self._shared[layer]
        if shared is None or len(shared) != batch:
            shared = np.zeros((batch, batch), dtype=np.int64)
        with torch.inference_mode(False), torch.no_grad():
            chosen = torch.arange(batch)[rows.cpu()]
            index = chosen.numpy()
            if len(index) == batch:
                moved = np.flatnonzero(index != np.arange(batch))
                start = int(shared[moved, index[moved]].min(initial=length))
                to, of = (torch.from_numpy(x).to(self.device) for x in (moved, index[moved]))
                for block in held if start < length else ():
                    part = block[:, :, start:length]
                    part[to] = part[of]
            else:
                self._reserve(len(index) * length * sum(x[0, :, 0].nbytes for x in held))
                taken = [x[:, :, :length].index_select(0, chosen.to(self.device)) for x in held]
                self._place_apart(layer, taken[0], taken[1])
        alike = index[:, None] == index[None, :]
        self._shared[layer] = np.where(alike, length, shared[np.ix_(index, index)])

    def drop(self, layer: int, count: int) -> None:
        """Drop the last `count` positions of a layer."""
        length = self.lengths[layer] = max(0, self.lengths[layer] - count)
        shared = self._shared[layer]
        self._shared[layer] = None if shared is None else np.minimum(shared, length)

    def clear(self, layer: int) -> None:
        """Drop all of a layer, including its memory."""
        self.lengths[layer], self._blocks[layer], self._tensor = 0, None, None
        self._shared[layer] = None
        self._count()

    def _place_apart(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Move a layer to its own memory."""
        self._tensor, self._blocks[layer] = None, (keys, values)
        self._count()
        return keys, values
