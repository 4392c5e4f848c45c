"""Decode batch: runs the model on prompts, and on all running sequences one token at a time.

In: sequences' tokens, the optimized causal language model. Out: a row of float32 logits for each,
whatever joins and leaves between two steps::

    batch.begin({key: prompt}, 256); batch.read()  ->  {key: logits (vocabulary,)}
    batch.join({key: token}); batch.step()         ->  {key: logits (vocabulary,)}
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from turbotx.engine.cache_rows import (
    CacheRow,
    blank_like,
    compose,
    free_cache,
    free_row,
    memory_of,
)
from turbotx.runtime.block_memory import BlockMemory
from turbotx.serving.generation.sampling import Logits
from turbotx.serving.generation.slots import BLOCK, Entry, Slots

GROWING = 3
"""What sequences use of the bytes of a contiguous cache is one part of three: it has room for up to
twice as many positions as are filled, and while it is written anew the old one is there too."""


@dataclass
class PromptReading:
    """Prompts that are read together, equal ones once, the shorter ones filled up on the left.

    rows: the prompts, each with those that go on from it. Columns: `pad` empty ones, then `length`
    of the longest prompt, of which `done` are in the cache and `next` after the next call.
    """

    rows: list[tuple[tuple[int, ...], list[Hashable]]]
    cache: Any
    pad: int
    length: int
    next: int
    done: int = 0

    @property
    def keys(self) -> list[Hashable]:
        """Those who wait for it."""
        return [key for _, keys in self.rows for key in keys]


@dataclass
class DecodeBatch:
    """Owned by one thread. module: called with `past_key_values`, as transformers' models are.

    piece: columns of prompts that are read between two steps. slots: the rows of those who decode.
    reading: the prompts that are being read.
    """

    module: Any
    config: Any
    takes: frozenset[str]
    device: str
    piece: int
    slots: Slots = field(default_factory=Slots)
    reading: PromptReading | None = None
    _like: Any = None
    _cache: Any = None
    _places: list[Hashable] = field(default_factory=list)
    """Whose the rows of `_cache` are."""
    _tokens: dict[Hashable, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, module: Any, device: str, piece: int) -> DecodeBatch:
        """Return a batch; module: `model` optimized, or itself."""
        takes = frozenset(inspect.signature(type(model).forward).parameters)
        return cls(module, model.config, takes, device, piece)

    def prepare(self, token: int) -> None:
        """Run one token, so that no request waits for the capture; what a cache takes is known from
        then on."""
        self._like = DynamicCache(config=self.config)
        self._call(self._like, np.array([[token]]), np.ones((1, 1), np.int64))
        free_cache(self._like)

    def begin(self, prompts: Mapping[Hashable, Sequence[int]]) -> None:
        """Begin a reading of prompts; nothing runs yet. A step is to be taken between two calls of
        `read` where sequences decode meanwhile."""
        rows: dict[tuple[int, ...], list[Hashable]] = {}
        for key, prompt in prompts.items():
            rows.setdefault(tuple(prompt), []).append(key)
        length = max(map(len, rows))
        pad = self.slots.pad(length, self.piece)
        cache = blank_like(self._like, len(rows), pad)
        first = min(length, self.piece)
        self.reading = PromptReading(list(rows.items()), cache, pad, length, first)

    def read(self) -> dict[Hashable, Logits] | None:
        """Run the next columns of the reading; return the logits after each one's prompt when it is
        done, (vocabulary,) float32."""
        reading = self.reading
        assert reading is not None
        begin, end, length = reading.done, reading.next, reading.length
        ids = np.zeros((len(reading.rows), length), np.int64)
        mask = np.zeros((len(ids), reading.pad + length), np.int64)
        for row, (prompt, _) in enumerate(reading.rows):
            ids[row, length - len(prompt) :] = prompt
            mask[row, mask.shape[1] - len(prompt) :] = 1
        logits = self._call(reading.cache, ids[:, begin:end], mask[:, : reading.pad + end])
        reading.done, reading.next = end, min(length, end + self.piece)
        if end < length:
            return None
        return {key: logits[r] for r, (_, keys) in enumerate(reading.rows) for key in keys}

    def join(self, tokens: Mapping[Hashable, int]) -> None:
        """Let all whose prompts are read take part in the next step, which goes on with these
        tokens. Rows of caches move by their blocks."""
        reading, self.reading = self.reading, None
        assert reading is not None
        joining = [
            (key, CacheRow(reading.cache, row, len(prompt)))
            for row, (prompt, keys) in enumerate(reading.rows)
            for key in keys
        ]
        self.slots.join([Entry(k, row.count) for k, row in joining], reading.pad + reading.length)
        self._settle(dict(joining))
        self._tokens.update(tokens)
        free_cache(reading.cache)

    def leave(self, key: Hashable) -> None:
        """Let a sequence take part no more; its blocks of memory are free at once."""
        if key in self._places:
            place = self._places.index(key)
            free_row(self._cache, place)
            self._places[place] = None
        self.slots.leave(key)
        self._tokens.pop(key, None)
        if not self.slots.rows:
            self._cache, self._places = None, []
        if self.reading is not None and key in self.reading.keys:
            self._leave_reading(self.reading, key)

    def step(self) -> dict[Hashable, Logits]:
        """Run every sequence's next token; return the logits after it, (vocabulary,) each."""
        self._settle()
        rows, length = self.slots.rows, self.slots.length + 1
        ids = np.array([[self._tokens[entry.key]] for entry in rows])
        mask = np.zeros((len(rows), length), np.int64)
        for row, entry in enumerate(rows):
            mask[row, length - 1 - entry.count :] = 1
        logits = self._call(self._cache, ids, mask)
        self.slots.advance()
        return {entry.key: logits[row] for row, entry in enumerate(rows)}

    def push(self, key: Hashable, token: int) -> None:
        """Say which token a sequence goes on with."""
        self._tokens[key] = token

    # --- the memory, in blocks of every layer ---

    @property
    def in_blocks(self) -> bool:
        """Whether caches lie in blocks; otherwise they are contiguous, and counted by positions."""
        return isinstance(memory_of(self._like), BlockMemory)

    @property
    def layers(self) -> int:
        """Layers of a cache, each of which has blocks of its own."""
        return len(memory_of(self._like).shapes)

    def count_room(self, nbytes: int) -> int:
        """Return how many blocks of every layer there may be in so many bytes."""
        block_nbytes = memory_of(self._like).block_nbytes
        return nbytes // (block_nbytes * self.layers * (1 if self.in_blocks else GROWING))

    @property
    def layer_blocks(self) -> int:
        """Blocks of single layers that are taken."""
        memory = memory_of(self._like)
        if isinstance(memory, BlockMemory):
            return memory.blocks.used
        reading = self.reading
        read = (
            0 if reading is None else len(reading.rows) * -(-(reading.pad + reading.done) // BLOCK)
        )
        return self.layers * (len(self._places) * -(-self.slots.length // BLOCK) + read)

    @property
    def used(self) -> int:
        """Blocks of every layer that are taken, rounded up."""
        return -(-self.layer_blocks // self.layers)

    def count_prompt(self, length: int) -> int:
        """Return how many blocks of every layer a row takes of prompts of so many columns that are
        read now."""
        return -(-(self.slots.pad(length, self.piece) + length) // BLOCK)

    def needed(self) -> int:
        """Return how many blocks of every layer the next turn takes at the most: the next columns
        of the reading, and a step of all who decode then."""
        self._settle()
        found, slots, reading = 0, self.slots, self.reading
        if slots.rows:
            found += memory_of(self._cache).count_new(len(slots.rows), slots.length + 1)
        if reading is not None:
            end, rows, keys = reading.pad + reading.next, len(reading.rows), len(reading.keys)
            found += memory_of(reading.cache).count_new(rows, end)
            if reading.next == reading.length:  # they take a step, and each its own last block
                found += self.layers * (keys if end % BLOCK == 0 else keys - rows)
        return -(-found // self.layers)

    def nbytes(self) -> int:
        """Return what the caches take."""
        reading = self.reading
        caches = [self._cache, None if reading is None else reading.cache]
        return sum(memory_of(cache).nbytes for cache in caches if cache is not None)

    def _settle(self, new: Mapping[Hashable, CacheRow] | None = None) -> None:
        """Make the cache of the rows that there are now."""
        rows, given = self.slots.rows, new or {}
        if not rows or (not given and None not in self._places):
            return
        old = self._cache
        places = {key: place for place, key in enumerate(self._places)}
        self._cache = compose(
            [given.get(e.key) or CacheRow(old, places[e.key], e.count) for e in rows],
            self.slots.length,
        )
        self._places = [e.key for e in rows]
        if old is not None:
            free_cache(old)

    def _leave_reading(self, reading: PromptReading, key: Hashable) -> None:
        rows = [(p, [k for k in keys if k != key]) for p, keys in reading.rows]
        kept = [r for r, (_, keys) in enumerate(rows) if keys]
        reading.rows = [rows[r] for r in kept]
        end, old = reading.pad + reading.done, reading.cache
        if not kept:
            self.reading = None
        elif len(kept) == len(rows):
            return
        elif end:
            reading.cache = compose([CacheRow(old, r, end) for r in kept], end)
        else:
            reading.cache = blank_like(old, len(kept), 0)
        free_cache(old)

    def _call(self, cache: Any, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Logits:
        inputs: dict[str, Any] = {
            "input_ids": torch.from_numpy(np.ascontiguousarray(ids)),
            "attention_mask": torch.from_numpy(np.ascontiguousarray(mask)),
        }
        if "position_ids" in self.takes:
            positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
            inputs["position_ids"] = torch.from_numpy(np.ascontiguousarray(positions))
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        if "logits_to_keep" in self.takes:
            inputs["logits_to_keep"] = 1
        with torch.inference_mode():
            found = self.module(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]
            logits: Logits = found.float().cpu().numpy()
        return logits
