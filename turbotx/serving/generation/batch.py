"""Decode batch: runs the model on prompts, and on all running sequences one token at a time.

In: the sequences' tokens and the optimized causal language model. Out: logits per sequence, which a
GPU may still be computing; sequences may join and leave between two steps::

    batch.begin(batch.lay_out([sequence])); batch.read()  ->  StepLogits of {sequence: 0}
    batch.join({sequence: token}); batch.step()           ->  StepLogits of {sequence: 0}
"""

from __future__ import annotations

import inspect
import logging
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
from turbotx.errors import TurbotxError
from turbotx.runtime.block_memory import BlockMemory
from turbotx.serving.generation.prefixes import Mask, PrefixBlock, PrefixTree
from turbotx.serving.generation.reading import Prompted, PromptReading, lay_out
from turbotx.serving.generation.slots import BLOCK, Entry, Slots
from turbotx.serving.generation.step_logits import StepLogits

log = logging.getLogger(__name__)

GROWING = 3
"""What sequences use of the bytes of a contiguous cache is one part of three: it has room for up to
twice as many positions as are filled, and while it is written anew the old one is there too."""


TRIED = 8
"""Tokens whose logits show whether empty columns before them change anything."""
FARTHEST = 8_192
"""Columns that are tried at the most."""


@dataclass(frozen=True)
class _Row:
    """A row of a cache, and the mask of its columns from its first block on."""

    cache: Any
    place: int
    mask: Mask


@dataclass
class DecodeBatch:
    """The running batch; used by one thread.

    module: called with `past_key_values`, like transformers' models. piece: prompt columns read
    between two decoding steps. slots: rows of the decoding sequences. reading: the prompts being
    read. most_blocks: limit of cache blocks per layer, cached prefixes included. no_prefixes: the
    reason if prefixes are not cached, else None.
    """

    module: Any
    config: Any
    takes: frozenset[str]
    device: str
    piece: int
    most_blocks: int = 0
    slots: Slots = field(default_factory=Slots)
    reading: PromptReading | None = None
    prefixes: PrefixTree = field(default_factory=PrefixTree)
    no_prefixes: str | None = "nothing has run"
    _like: Any = None
    _cache: Any = None
    _places: list[Hashable] = field(default_factory=list)
    """Whose the rows of `_cache` are."""
    _mask: Mask = field(default_factory=lambda: np.ones((0, 0), np.bool_))
    """Which columns of `_cache` have tokens, (rows, columns or more)."""
    _tokens: dict[Hashable, list[int]] = field(default_factory=dict)
    """Of those who decode; the last one is not in the cache."""
    _held: dict[Hashable, PrefixBlock] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, module: Any, device: str, piece: int) -> DecodeBatch:
        """Return an empty batch; module: `model`, optimized or not."""
        takes = frozenset(inspect.signature(type(model).forward).parameters)
        return cls(module, model.config, takes, device, piece)

    def prepare(self, token: int, context: int, reuse: bool = True) -> None:
        """Run a few tokens up to `token`, so that no request waits for the capture; find the
        cache's size, how many columns the model takes, and whether prefixes can be reused.

        token: a valid token id. context: most positions of a text. reuse: False if prefixes are
        not to be reused.
        """
        self._like = DynamicCache(config=self.config)
        self._call(self._like, np.array([[token]]), np.ones((1, 1), np.bool_)).cpu()
        free_cache(self._like)
        memory = memory_of(self._like)
        self.slots.most = None if self._takes_columns(token, context + BLOCK) else context
        if not reuse:
            self.no_prefixes = "it is switched off"
        elif not isinstance(memory, BlockMemory):
            self.no_prefixes = "caches are contiguous here"
        elif any(memory.windows):
            self.no_prefixes = "layers see a window of columns"
        elif context < 2 * BLOCK + TRIED:
            self.no_prefixes = f"texts of {context} tokens are too short"
        elif not memory.budget.has_room(4 * self.layers * memory.block_nbytes):
            self.no_prefixes = "the cache has room for too few blocks"
        elif self._sees(token, 0):
            self.no_prefixes = "logits change where a block is shared"
        else:
            gap = (min(context, FARTHEST) - BLOCK - TRIED) // BLOCK * BLOCK
            gaps = not self._sees(token, gap)
            self.no_prefixes, self.prefixes = None, PrefixTree(memory.blocks, gaps)

    def _takes_columns(self, token: int, columns: int) -> bool:
        """Return whether the model runs with this many columns, all but one of them empty: not if
        it has a table by column, such as GPT-Neo's masks and MPT's biases."""
        mask = np.zeros((1, columns), np.bool_)
        mask[:, -1] = True
        cache = None
        try:
            cache = blank_like(self._like, 1, columns - 1)
            self._call(cache, np.array([[token]]), mask).cpu()  # waits for its errors
        except (TurbotxError, RuntimeError) as error:
            log.info("columns are bounded by the model's positions: %s", error)
            return False
        finally:
            if cache is not None:
                free_cache(cache)
        return True

    def _sees(self, token: int, gap: int) -> bool:
        """Return whether `gap` empty columns between a reused block and the next tokens change the
        logits, as with biases by column distance, or sliding windows that the cache does not
        handle."""
        ids = np.maximum(token - np.arange(BLOCK + TRIED), 0)[None]
        cache = blank_like(self._like, 1, 0)
        near = self._call(cache, ids, np.ones(ids.shape, np.bool_)).float()
        memory = memory_of(cache)
        assert isinstance(memory, BlockMemory)
        known = np.stack([table[:, :1] for table in memory.tables])
        behind = blank_like(self._like, 1, BLOCK + gap, known)
        mask = np.ones((1, BLOCK + gap + TRIED), np.bool_)
        mask[:, BLOCK:-TRIED] = False
        far = self._call(behind, ids[:, BLOCK:], mask).float()
        free_cache(behind)
        free_cache(cache)
        rounding = 1e-3 if memory.dtype == torch.float32 else 3e-2
        return not float((near - far).abs().max()) <= rounding * float(near.abs().max())

    def close(self) -> None:
        """Release all cached prefix blocks, after all sequences have left."""
        self.prefixes.evict(self.prefixes.idle)

    def lay_out(self, sequences: Sequence[Prompted]) -> PromptReading:
        """Return the layout of a joint prefill of these prompts."""
        columns = self.most_blocks * BLOCK
        return lay_out(sequences, self.slots, self.prefixes, self.piece, columns)

    def begin(self, reading: PromptReading) -> None:
        """Start a prefill without running it. If sequences are decoding, the caller takes a step
        between two calls of `read`."""
        table = reading.table(self.layers) if reading.first else None
        reading.cache = blank_like(self._like, len(reading.rows), reading.start, table)
        self.reading = reading
        for row in reading.rows:
            for key in row.keys:
                self.prefixes.hold(row.prefix)
                self._held[key] = row.prefix

    def read(self) -> StepLogits:
        """Run the next columns of the prefill; return the logits of its sequences, of none before
        it is complete."""
        reading = self.reading
        assert reading is not None
        begin, end, length = reading.done, reading.next, reading.length
        ids = np.zeros((len(reading.rows), length), np.int64)
        for row, own in zip(reading.rows, ids, strict=True):
            left = row.prompt[row.cached :]
            own[length - len(left) :] = left
        mask = np.stack([reading.mask_of(row) for row in reading.rows])[:, : reading.start + end]
        self._evict(memory_of(reading.cache).count_new(len(ids), mask.shape[1]))
        logits = self._call(reading.cache, ids[:, begin:end], mask)
        reading.done, reading.next = end, min(length, end + self.piece)
        rows = enumerate(reading.rows if end == length else [])
        return StepLogits(logits, {key: r for r, row in rows for key in row.keys})

    def join(self, tokens: Mapping[Hashable, int]) -> None:
        """Add the sequences of the finished prefill to the batch; tokens: the next token of each.
        Cache rows are moved by their block tables."""
        reading, self.reading = self.reading, None
        assert reading is not None
        joining: dict[Hashable, _Row] = {}
        for place, row in enumerate(reading.rows):
            mask = reading.mask_of(row)
            for key in row.keys:
                self._remember(key, reading.cache, place, row.prompt, mask)
                self._tokens[key] = [*row.prompt, tokens[key]]
                joining[key] = _Row(reading.cache, place, mask[mask.argmax() :])
        self.slots.join([Entry(k, len(row.mask)) for k, row in joining.items()], reading.end)
        self._settle(joining)
        free_cache(reading.cache)

    def leave(self, key: Hashable, keep: bool = True) -> None:
        """Remove a sequence. Its blocks are released; full ones stay cached as prefixes.

        keep: False if their contents may be wrong."""
        if key in self._places:
            place = self._places.index(key)
            if keep:
                self._remember(key, self._cache, place, self._tokens[key], self._mask_of(place))
            free_row(self._cache, place)
            self._places[place] = None
        self.slots.leave(key)
        self._tokens.pop(key, None)
        if not self.slots.rows:
            self._cache, self._places = None, []
        if self.reading is not None and key in self.reading.keys:
            self._leave_reading(self.reading, key, keep)
        if key in self._held:
            self.prefixes.let_go(self._held.pop(key))

    def step(self) -> StepLogits:
        """Run one decoding step; return the logits of every sequence."""
        self._settle()
        rows, length = self.slots.rows, self.slots.length + 1
        if length > self._mask.shape[1]:
            self._mask = np.pad(self._mask, ((0, 0), (0, BLOCK)), constant_values=True)
        ids = np.array([[self._tokens[entry.key][-1]] for entry in rows])
        self._evict(memory_of(self._cache).count_new(len(rows), length))
        logits = self._call(self._cache, ids, self._mask[:, :length])
        self.slots.advance()
        return StepLogits(logits, {entry.key: row for row, entry in enumerate(rows)})

    def push(self, key: Hashable, token: int) -> None:
        """Set a sequence's next token."""
        self._tokens[key].append(token)

    # --- cache memory, counted in blocks of all layers ---

    @property
    def overlaps(self) -> bool:
        """Whether a call returns before its logits are computed."""
        return torch.device(self.device).type != "cpu"

    @property
    def in_blocks(self) -> bool:
        """Whether caches use blocks; otherwise they are contiguous and counted by positions."""
        return isinstance(memory_of(self._like), BlockMemory)

    @property
    def layers(self) -> int:
        """Number of layers; each has its own blocks."""
        return len(memory_of(self._like).shapes)

    def count_room(self, nbytes: int) -> int:
        """Return how many blocks per layer fit into `nbytes`."""
        block_nbytes = memory_of(self._like).block_nbytes
        return nbytes // (block_nbytes * self.layers * (1 if self.in_blocks else GROWING))

    @property
    def layer_blocks(self) -> int:
        """Blocks used by sequences, summed over layers."""
        memory = memory_of(self._like)
        if isinstance(memory, BlockMemory):
            return memory.blocks.used - self.layers * self.prefixes.idle
        reading = self.reading
        read = (
            0
            if reading is None
            else len(reading.rows) * -(-(reading.start + reading.done) // BLOCK)
        )
        return self.layers * (len(self._places) * -(-self.slots.length // BLOCK) + read)

    @property
    def used(self) -> int:
        """Blocks per layer used by sequences, rounded up."""
        return -(-self.layer_blocks // self.layers)

    def needed(self) -> int:
        """Return the most blocks per layer that the next turn allocates: the next prefill columns
        and a step of all sequences that decode then."""
        self._settle()
        found, slots, reading = 0, self.slots, self.reading
        if slots.rows:
            found += memory_of(self._cache).count_new(len(slots.rows), slots.length + 1)
        if reading is not None:
            end, rows, keys = reading.start + reading.next, len(reading.rows), len(reading.keys)
            found += memory_of(reading.cache).count_new(rows, end)
            if reading.next == reading.length:  # they decode a step, each in its own block
                found += self.layers * (keys if end % BLOCK == 0 else keys - rows)
        return -(-found // self.layers)

    def nbytes(self) -> int:
        """Return the bytes of the caches."""
        reading = self.reading
        caches = [self._cache, None if reading is None else reading.cache]
        return sum(memory_of(cache).nbytes for cache in caches if cache is not None)

    def _evict(self, count: int) -> None:
        """Evict cached prefixes so that `count` more blocks, summed over layers, can be
        allocated."""
        if self.prefixes.idle:
            most = self.most_blocks * self.layers
            over = self.layer_blocks + self.layers * self.prefixes.idle + count - most
            self.prefixes.evict(max(0, -(-over // self.layers)))

    def _remember(
        self, key: Hashable, cache: Any, place: int, tokens: Sequence[int], mask: Mask
    ) -> None:
        """Add a row's full blocks to the prefix tree."""
        memory = memory_of(cache)
        if self.prefixes.enabled and isinstance(memory, BlockMemory):
            held, table = self._held[key], np.stack([t[place] for t in memory.tables])
            self._held[key] = self.prefixes.add(held, tokens, mask, table)

    def _mask_of(self, place: int) -> Mask:
        """Return the mask of the batch row's columns, True where it has tokens."""
        return self._mask[place, : memory_of(self._cache).length]

    def _settle(self, new: Mapping[Hashable, _Row] | None = None) -> None:
        """Rebuild the batch's cache for the current rows."""
        rows, found = self.slots.rows, dict(new or {})
        if not rows or (not found and None not in self._places):
            return
        old, length = self._cache, self.slots.length
        for place, key in enumerate(self._places):
            if key is not None:
                found[key] = _Row(old, place, self._mask_of(place))
        mask = np.ones((len(rows), length + BLOCK), np.bool_)
        for place, entry in enumerate(rows):
            mask[place, : length - entry.count] = False
            own = found[entry.key].mask
            mask[place, length - entry.count : length] = own[len(own) - entry.count :]
        taken = [CacheRow(found[e.key].cache, found[e.key].place, e.count) for e in rows]
        self._cache, self._mask = compose(taken, length), mask
        self._places = [e.key for e in rows]
        if old is not None:
            free_cache(old)

    def _leave_reading(self, reading: PromptReading, key: Hashable, keep: bool) -> None:
        end, old = reading.start + reading.done, reading.cache
        for place, row in enumerate(reading.rows):
            if key in row.keys and keep:
                mask = reading.mask_of(row)[:end]
                self._remember(key, old, place, row.prompt[: mask.sum()], mask)
            row.keys = [k for k in row.keys if k != key]
        kept = [place for place, row in enumerate(reading.rows) if row.keys]
        if len(kept) == len(reading.rows):
            return
        reading.rows = [reading.rows[place] for place in kept]
        if not kept:
            self.reading = None
        elif end:
            reading.cache = compose([CacheRow(old, place, end) for place in kept], end)
        else:
            reading.cache = blank_like(old, len(kept), 0)
        free_cache(old)

    def _call(self, cache: Any, ids: NDArray[np.int64], columns: Mask) -> torch.Tensor:
        """Return the logits of the last column, (rows, vocabulary), on the model's device."""
        mask = columns.astype(np.int64)
        inputs: dict[str, Any] = {
            "input_ids": torch.from_numpy(np.ascontiguousarray(ids)),
            "attention_mask": torch.from_numpy(mask),
        }
        if "position_ids" in self.takes:
            made = ids.shape[1]
            if made == 1:
                positions = mask.sum(axis=1, keepdims=True)
            else:
                positions = np.ascontiguousarray(mask.cumsum(axis=1)[:, -made:])
            inputs["position_ids"] = torch.from_numpy(np.maximum(positions - 1, 0))
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        if "logits_to_keep" in self.takes:
            inputs["logits_to_keep"] = 1
        with torch.inference_mode():
            found = self.module(**inputs, past_key_values=cache, use_cache=True)
            logits: torch.Tensor = found.logits[:, -1]
        return logits
