"""Decode batch: runs the model on prompts, and on all running sequences one token at a time.

In: sequences' tokens, the optimized causal language model. Out: a row of float32 logits for each,
whatever joins and leaves between two steps::

    batch.read([prompt])  ->  logits (1, vocabulary);  batch.join([...]);  batch.step()
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

from turbotx.engine.cache_rows import CacheRow, compose, free_row, memory_of, put_row
from turbotx.serving.generation.sampling import Logits
from turbotx.serving.generation.slots import Entry, Rebuild, Slots


@dataclass
class PromptReading:
    """Prompts that are read together, the shorter ones filled up on the left.

    done: columns that are in the cache. Rows: one a prompt.
    """

    prompts: Sequence[Sequence[int]]
    cache: Any
    done: int = 0

    @property
    def length(self) -> int:
        """Columns of the longest prompt."""
        return max(map(len, self.prompts))


@dataclass
class Joining:
    """A sequence that joins the batch: its key, its next token, its row of a reading."""

    key: Hashable
    token: int
    reading: PromptReading
    row: int


@dataclass
class DecodeBatch:
    """Owned by one thread. module: called with `past_key_values`, as transformers' models are."""

    module: Any
    config: Any
    takes: frozenset[str]
    device: str = "cpu"
    slots: Slots = field(default_factory=Slots)
    _cache: Any = None
    _tokens: dict[Hashable, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, module: Any, device: str = "cpu") -> DecodeBatch:
        """Return a batch; module: `model` optimized, or itself."""
        takes = frozenset(inspect.signature(type(model).forward).parameters)
        return cls(module, model.config, takes, device)

    def begin(self, prompts: Sequence[Sequence[int]]) -> PromptReading:
        """Return a reading of prompts; nothing runs yet."""
        return PromptReading(prompts, DynamicCache(config=self.config))

    def read(self, reading: PromptReading, count: int) -> Logits | None:
        """Run at most `count` more columns; return the logits after the last one when it is done,
        (prompts, vocabulary) float32."""
        begin, end = reading.done, min(reading.done + count, reading.length)
        length = reading.length
        ids = np.zeros((len(reading.prompts), length), np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(reading.prompts):
            ids[row, length - len(prompt) :] = prompt
            mask[row, length - len(prompt) :] = 1
        logits = self._call(reading.cache, ids[:, begin:end], mask[:, :end])
        reading.done = end
        return logits if end == length else None

    def join(self, new: Sequence[Joining]) -> None:
        """Let sequences whose prompts are read take part in the next step."""
        places = {j.key: CacheRow(j.reading.cache, j.row, len(j.reading.prompts[j.row]))
                  for j in new}  # fmt: skip
        change = self.slots.join([Entry(j.key, places[j.key].count) for j in new])
        if isinstance(change, Rebuild):
            self._rebuild(change, places)
        else:
            for place in change:
                put_row(self._cache, place.row, places[place.entry.key])
        self._tokens.update({j.key: j.token for j in new})

    def leave(self, key: Hashable) -> None:
        """Let a sequence take part no more; its blocks of memory are free at once."""
        for row, entry in enumerate(self.slots.rows):
            if entry is not None and entry.key == key:
                free_row(self._cache, row)
        self.slots.leave(key)
        self._tokens.pop(key, None)

    def tidy(self, force: bool = False) -> None:
        """Give memory back that no sequence uses, where that is worth writing the rest anew."""
        change = self.slots.tidy(force)
        if change is not None:
            self._rebuild(change, {})
        elif not self.slots.rows:
            self._cache = None

    def step(self) -> dict[Hashable, Logits]:
        """Run every sequence's next token; return the logits after it, (vocabulary,) each."""
        rows, length = self.slots.rows, self.slots.length + 1
        ids = np.zeros((len(rows), 1), np.int64)
        mask = np.zeros((len(rows), length), np.int64)
        for row, entry in enumerate(rows):
            ids[row] = 0 if entry is None else self._tokens[entry.key]
            # A free row sees itself alone: a softmax over nothing would be no number.
            mask[row, length - 1 - (0 if entry is None else entry.count) :] = 1
        logits = self._call(self._cache, ids, mask)
        self.slots.advance()
        return {e.key: logits[row] for row, e in enumerate(rows) if e is not None}

    def push(self, key: Hashable, token: int) -> None:
        """Say which token a sequence goes on with."""
        self._tokens[key] = token

    def nbytes(self) -> int:
        """Return what the batch's cache takes."""
        return 0 if self._cache is None else memory_of(self._cache).nbytes

    def position_nbytes(self, token: int) -> int:
        """Return what one position of one sequence takes in the cache, by running one token."""
        reading = self.begin([[token]])
        self.read(reading, 1)
        return memory_of(reading.cache).position_nbytes

    def _rebuild(self, change: Rebuild, new: Mapping[Hashable, CacheRow]) -> None:
        self._cache = compose(
            [
                new[entry.key] if row is None else CacheRow(self._cache, row, entry.count)
                for entry, row in zip(change.entries, change.rows, strict=True)
            ],
            change.length,
        )

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
