"""Batch engines: compute token rows, one array per row.

In: a PyTorch module, eager or optimized by turbotx; then rows of token ids, one batch at a time,
from one thread. Out: a float32 array for each row::

    TorchEngine(SentenceModel(bert, steps), Head("embedding")).run(rows)    # (n, 384) float32
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from turbotx.errors import InputError, OptionsError, PackError, first_line
from turbotx.serving.tokens import TokenRow

log = logging.getLogger(__name__)
Padding = Literal["auto", "packed", "padded"]
Vectors = NDArray[np.float32]
Rows = Vectors | Sequence[Vectors]  # one array per row of the batch


@dataclass(frozen=True)
class Head:
    """The kind of result of a row: a pooled embedding, a classifier's logits, one vector per token,
    or a sparse vector over the vocabulary as (index, weight) pairs."""

    kind: Literal["embedding", "classifier", "tokens", "sparse"]
    pooling: str = "mean"  # sentence-transformers' name; several modes are joined by +
    normalize: bool = False  # default from the model's files; applied after the engine
    labels: tuple[str, ...] = ()
    sigmoid: bool = False  # multi-label: sigmoid per class; False: softmax over the classes


class BatchEngine(Protocol):
    """Computes batches. An exception of ``run`` fails only its batch."""

    @property
    def head(self) -> Head:
        """The kind of results, such as pooled embeddings or logits."""

    @property
    def packs(self) -> bool | None:
        """Whether batches run without padding, valid after the first run; None: computed
        elsewhere."""

    def run(self, rows: Sequence[TokenRow]) -> Rows:
        """Return a float32 array per row: (width,) unnormalized embedding or logits, (tokens,
        width) of a token model, (words, 2) of a sparse model."""

    def figures(self) -> Mapping[str, float]:
        """Return gauges of memory and programs for the metrics, by name."""


@dataclass
class TorchEngine:
    """Runs a module that maps int64 ``input_ids`` and ``attention_mask`` (batch, seq) to (batch,
    width).

    Rows are padded on the right, whatever the tokenizer's own side: positions then start at the
    first token, and a row's result does not depend on the other rows' lengths. With ``padding``
    "packed" rows are concatenated without padding (``module.packed``); with "auto" the first batch
    decides whether that is possible, otherwise batches are padded.
    """

    module: Any
    head: Head
    pad_id: int = 0
    takes_types: bool = True  # whether the module takes token_type_ids
    device: str = "cpu"
    padding: Padding = "padded"
    calls: int = field(default=0, init=False)

    @property
    def packs(self) -> bool:
        """Whether batches run without padding."""
        return self.padding != "padded" and bool(self.module.packs)

    def run(self, rows: Sequence[TokenRow]) -> Rows:
        """Run the module on the rows; return a float32 array per row."""
        if not self.packs:
            return self._run_padded(rows)
        try:
            found = self._run_packed(rows)
        except (PackError, OptionsError, InputError) as error:
            if self.padding == "packed" or self.calls:
                raise
            log.info("served padded: %s", first_line(error))
            self.module.pad()
            return self._run_padded(rows)
        self.calls += 1
        return found

    def _run_packed(self, rows: Sequence[TokenRow]) -> Rows:
        import torch

        lengths = [len(row) for row in rows]
        ids = np.fromiter(itertools.chain.from_iterable(r.ids for r in rows), np.int64)
        inputs = {"input_ids": torch.from_numpy(ids).to(self.device)}
        if self.takes_types:
            types = [np.zeros(len(r), np.int64) if r.types is None else r.types for r in rows]
            inputs["token_type_ids"] = torch.from_numpy(np.concatenate(types)).to(self.device)
        with torch.inference_mode():
            result: Vectors = self.module.packed(lengths, **inputs).float().cpu().numpy()
        if self.head.kind == "tokens":
            return np.split(result, np.cumsum(lengths)[:-1])
        return self._by_row(result)

    def _run_padded(self, rows: Sequence[TokenRow]) -> Rows:
        import torch

        ids, mask, types = pad_rows(rows, self.pad_id)
        inputs = {
            "input_ids": torch.from_numpy(ids).to(self.device),
            "attention_mask": torch.from_numpy(mask).to(self.device),
        }
        if self.takes_types:
            inputs["token_type_ids"] = torch.from_numpy(types).to(self.device)
        with torch.inference_mode():
            vectors = self.module(**inputs)
            result: Vectors = vectors.float().cpu().numpy()
        self.calls += 1
        if self.head.kind == "tokens":
            return [found[: len(row)] for found, row in zip(result, rows, strict=True)]
        return self._by_row(result)

    def _by_row(self, result: Vectors) -> Rows:
        return [only_weights(x) for x in result] if self.head.kind == "sparse" else result

    def keep(self) -> None:
        """Save the compiled program for the next start, if the module supports that."""
        keep = getattr(self.module, "keep", None)
        if callable(keep):
            keep()

    def figures(self) -> Mapping[str, float]:
        """Return the number of batches and the statistics of an optimized module."""
        found = {"batches": float(self.calls)}
        stats = getattr(self.module, "stats", None)  # an optimized module has plans, arena, builds
        if callable(stats):
            found.update({name: float(value) for name, value in stats().items()})
        return found


def pad_rows(
    rows: Sequence[TokenRow], pad_id: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return ids padded on the right, attention mask and segment ids, (batch, longest) int64
    each."""
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    types = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row.ids
        mask[i, : len(row)] = 1
        if row.types is not None:
            types[i, : len(row)] = row.types
    return ids, mask, types


def only_weights(weights: Vectors) -> Vectors:
    """Return the non-zero entries of (vocabulary,) weights as (words, 2): index and weight."""
    words = np.flatnonzero(weights)
    return np.stack([words.astype(np.float32), weights[words]], axis=1)


def normalize_rows(vectors: Vectors) -> Vectors:
    """Return (..., width) float32 vectors scaled to L2 norm 1; zero vectors stay zero."""
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    result: Vectors = vectors / np.maximum(norm, 1e-12)
    return result
