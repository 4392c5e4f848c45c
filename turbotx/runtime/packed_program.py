"""Packed program: a program over tokens that runs padded and flat calls.

In: a call's tensors, one of them a mask. Out: the model's own outputs with zeros in padded rows, or
rows by token for a flat call::

    program.run(program.bind((8, 500)), [ids, mask])   # costs only the unmasked tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from turbotx.errors import InputError
from turbotx.memory.pool import ChunkPool
from turbotx.passes.packing import TokenPacking
from turbotx.program.executable import Executable
from turbotx.runtime.binding import Binding, Runtime
from turbotx.runtime.mixture import Mixture
from turbotx.runtime.program import Program
from turbotx.runtime.watch import Watch


@dataclass(frozen=True)
class PaddedBinding:
    """A padded call at one shape; its number of tokens is only known when it runs. dims: without
    it."""

    dims: tuple[int, ...]


class PackedProgram(Program):
    """A program whose last dim is the number of tokens, which padded calls do not have."""

    takes_any_sizes = False
    """Whether calls with other batch sizes and columns but the same tokens run identically."""

    def __init__(
        self, executable: Executable, runtime: Runtime, pool: ChunkPool, max_shapes: int,
        packing: TokenPacking,
    ) -> None:  # fmt: skip
        super().__init__(executable, runtime, pool, max_shapes)
        self._take_up(packing)

    def _take_up(self, packing: TokenPacking) -> None:
        self.packing = packing
        self.by_column = {t.name for t in self.executable.inputs if packing.seq in t.shape.texts}
        """Names of its inputs that have a row a column."""
        self._batch, self._seq = (self.dims.index(n) for n in (packing.batch, packing.seq))

    def bind(self, dims: tuple[int, ...]) -> Any:
        """Bind dims of a padded call, or of a packed one, which include the number of tokens."""
        return PaddedBinding(dims) if len(dims) < len(self.dims) else super().bind(dims)

    def serves(self, dims: Sequence[int]) -> bool:
        """Return whether it serves these dims; always True for dims of a padded call, whose number
        of tokens is unknown."""
        return len(dims) < len(self.dims) or super().serves(dims)

    def sizes_of(self, dims: Sequence[int], batch: int, seq: int) -> Sequence[int]:
        """Return dims for this many sequences and columns, given the dims of the call that was
        bound."""
        return dims

    def reserve(self, binding: Binding) -> None:
        """Map the memory for a shape without padding now, permanently."""
        *dims, _ = binding.dims
        super().reserve(super().bind((*dims, dims[self._batch] * dims[self._seq])))

    def run(
        self, binding: Any, tensors: Sequence[torch.Tensor], ticks: Any = None,
        watch: Watch | None = None,
    ) -> list[Any]:  # fmt: skip
        """Run a padded call (bound as such), or a packed one on its own inputs."""
        if not isinstance(binding, PaddedBinding):
            return super().run(binding, tensors, ticks, watch)
        mixture = self.find_mixture(binding.dims, tensors)
        found = self.run_mixture(binding.dims, mixture, tensors, ticks, watch)
        batch = binding.dims[self._batch]
        return [
            leaf if kind is None else _spread(mixture.put(leaf, batch), batch, kind)
            for leaf, kind in zip(found, self.packing.outputs, strict=True)
        ]

    def find_mixture(self, dims: Sequence[int], tensors: Sequence[torch.Tensor]) -> Any:
        """Return the `Mixture` of a padded call.

        Raises InputError if inputs have fewer batch rows than others, or if the mask has values
        other than 0 and 1.
        """
        batch, packing = dims[self._batch], self.packing
        mask = tensors[packing.mask]
        by_token = [tensors[i.source].shape[0] for i in packing.inputs
                    if i.by_token and i.source is not None]  # fmt: skip
        if max(mask.shape[0], *by_token) != batch:
            raise InputError(
                f"the call's first input has {batch} batch rows, and attention_mask or another "
                f"input {max(mask.shape[0], *by_token)}: padding='packed' takes one row a sequence"
            )
        return self.of_mask(mask.expand(batch, mask.shape[1]))

    def of_mask(self, mask: torch.Tensor) -> Any:
        """Return the `Mixture` of a mask (batch, seq); raise InputError for values other than 0 and
        1."""
        return Mixture.of_mask(mask, self.packing.from_start, self.packing.to_end)

    def of_lengths(self, lengths: Any, tokens: int, longest: int, device: torch.device) -> Any:
        """Return the `Mixture` of sequences with these lengths, with `tokens` in total and at most
        `longest` each."""
        return Mixture.of_lengths(lengths, device)

    def without_padding(self, leaves: Sequence[Any], mask: torch.Tensor) -> list[Any]:
        """Return the model's own leaves with zeros in padded rows, as `run` returns them."""
        found, hidden = list(leaves), mask.to(torch.bool).logical_not()
        for k, kind in enumerate(self.packing.outputs):
            if kind is None:
                continue
            rows = found[k] = leaves[k].clone()
            if kind.batch is None:
                rows.movedim(kind.columns, 0)[hidden.reshape(-1)] = 0
            else:
                rows.movedim((kind.batch, kind.columns), (0, 1))[hidden] = 0
        return found

    def without_empty_rows(self, leaves: Sequence[Any], mask: torch.Tensor) -> list[Any]:
        """Return leaves less the rows, of those with one a sequence, whose sequences hold no token:
        they are made of zeros here, and of padding by the model."""
        held, x = mask.to(torch.bool).any(1), self.executable
        by_sequence = {t.name for t in x.outputs if t.shape.texts[:1] == (self.packing.batch,)}
        known = zip(leaves, self.packing.outputs, x.leaves, strict=False)
        return [
            leaf[held] if kind is None and getattr(made, "name", None) in by_sequence else leaf
            for leaf, kind, made in known
        ]

    def run_mixture(
        self, dims: Sequence[int], mixture: Any, tensors: Sequence[torch.Tensor],
        ticks: Any = None, watch: Watch | None = None,
    ) -> list[Any]:  # fmt: skip
        """Run on the tokens of a mixture; return the leaves, those by token as (tokens, ...).

        tensors: the call's, padded if the mixture has rows, otherwise by token.
        """
        batch, given = dims[self._batch], []
        for x in self.packing.inputs:
            if x.source is None:
                given.append(mixture.made[x.name])
            elif x.by_token and mixture.rows is not None:
                given.append(mixture.take(tensors[x.source], batch))
            else:
                given.append(tensors[x.source])
        bound = super().bind((*dims, mixture.tokens))
        return super().run(bound, given, ticks, watch)


def _spread(rows: torch.Tensor, batch: int, kind: Any) -> torch.Tensor:
    """Return (batch * seq, ...) in the shape of the model's own leaf."""
    if kind.batch is None:
        return rows.movedim(0, kind.columns)
    whole = rows.view(batch, -1, *rows.shape[1:])
    return whole.movedim((0, 1), (kind.batch, kind.columns))
