"""Batch engines: token rows in, one vector per row out.

An engine is called from one thread, one batch at a time: a PyTorch module, or the same module
optimized by turbotx::

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

from turbotx.errors import InputError, OptionsError, PackError
from turbotx.serving.tokens import TokenRow

log = logging.getLogger(__name__)
Padding = Literal["auto", "packed", "padded"]
Vectors = NDArray[np.float32]
Rows = Vectors | Sequence[Vectors]  # one array for each row of a batch


@dataclass(frozen=True)
class Head:
    """What a row's answer is: a pooled embedding, the logits of a classifier, a vector for each of
    its tokens, or the words of the vocabulary that have a weight, as (index, weight) each."""

    kind: Literal["embedding", "classifier", "tokens", "sparse"]
    pooling: str = "mean"  # as the files call it; several modes are joined by +
    normalize: bool = False  # the model's files say so; the server normalises on request
    labels: tuple[str, ...] = ()
    sigmoid: bool = False  # each class has a probability of its own, else one of all is true


class BatchEngine(Protocol):
    """Computes batches. ``run`` may raise anything: only that batch fails."""

    @property
    def head(self) -> Head:
        """What its vectors are: pooled embeddings or logits."""

    @property
    def packs(self) -> bool | None:
        """Whether batches are without padding, known once it has run; None: others compute."""

    def run(self, rows: Sequence[TokenRow]) -> Rows:
        """Return a float32 array for each row: (width,) raw pooled embeddings or logits,
        (tokens, width) of a model of tokens, (words, 2) of a sparse one."""

    def figures(self) -> Mapping[str, float]:
        """Numbers about its memory and programs for the metrics, by name."""


@dataclass
class TorchEngine:
    """A module of ``input_ids`` and ``attention_mask`` to (batch, width), any (batch, seq).

    Rows are filled up on the right, whatever side the tokenizer would take: positions then begin
    at the first token, and no row's vector depends on the length of another. A module that is asked
    for ``padding`` "packed" runs them one behind the other instead, by its ``packed``; with "auto"
    the first batch finds out whether it can, and is padded where not.
    """

    module: Any
    head: Head
    pad_id: int = 0
    takes_types: bool = True  # whether the module reads token_type_ids
    device: str = "cpu"
    padding: Padding = "padded"
    calls: int = field(default=0, init=False)

    @property
    def packs(self) -> bool:
        """Whether it runs batches without padding."""
        return self.padding != "padded" and bool(self.module.packs)

    def run(self, rows: Sequence[TokenRow]) -> Rows:
        """Call the module on the rows, padded or not, and return a float32 array for each."""
        if not self.packs:
            return self._run_padded(rows)
        try:
            found = self._run_packed(rows)
        except (PackError, OptionsError, InputError) as error:
            if self.padding == "packed" or self.calls:
                raise
            log.info("served padded: %s", str(error).strip().splitlines()[0])
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
        """Keep what was compiled for the next start, where the module does."""
        keep = getattr(self.module, "keep", None)
        if callable(keep):
            keep()

    def figures(self) -> Mapping[str, float]:
        """Return the number of batches, and what an optimized module counts of itself."""
        found = {"batches": float(self.calls)}
        stats = getattr(self.module, "stats", None)  # an optimized module's: plans, arena, builds
        if callable(stats):
            found.update({name: float(value) for name, value in stats().items()})
        return found


def pad_rows(
    rows: Sequence[TokenRow], pad_id: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(batch, longest) int64 each: ids padded on the right, attention mask, segment ids."""
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
    """(vocabulary,) to (words, 2): index and weight of those that are not zero."""
    words = np.flatnonzero(weights)
    return np.stack([words.astype(np.float32), weights[words]], axis=1)


def normalize_rows(vectors: Vectors) -> Vectors:
    """Each row scaled to length 1; a zero row stays zero. float32, (..., width)."""
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    result: Vectors = vectors / np.maximum(norm, 1e-12)
    return result
