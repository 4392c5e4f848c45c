"""Mixture: the tokens of a batch of sequences, and their positions on one axis.

In: a mask (batch, seq), or lengths. Out: the inputs of a packed program besides the call's own, and
conversion of rows from padded tensors to tokens and back::

    Mixture.of_mask([[1, 1, 0], [0, 1, 0]])
      ->  bounds [0, 2, 3], starts [0, 1], positions [0, 1, 1]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from turbotx.errors import InputError


@dataclass(frozen=True)
class Mixture:
    """The tokens of concatenated sequences. There is at least one row; if there are no tokens, it
    belongs to no sequence.

    made: by the names of a packed program's inputs, int64: bounds (sequences + 1); starts
    (sequences,), the column of each sequence's first token; positions and sequence_of (tokens,);
    columns (seq,).
    rows: (tokens,), indices into (batch * seq); None if there are no padded tensors.
    shown: bool (tokens,), False for masked positions in between; None if there are none.
    """

    made: dict[str, torch.Tensor]
    rows: torch.Tensor | None
    shown: torch.Tensor | None

    @property
    def tokens(self) -> int:
        """Number of rows of a packed tensor."""
        return self.made["positions"].shape[0]

    @classmethod
    def of_mask(cls, mask: torch.Tensor, from_start: bool, to_end: bool) -> Mixture:
        """Return the `Mixture` of a mask (batch, seq): in each row, the positions from the first to
        the last 1.

        from_start, to_end: extend this to the first or the last column. Raises InputError for
        values other than 0 and 1.
        """
        shown = mask.to(torch.bool)
        require_binary(torch.equal(mask, shown.to(mask.dtype)))
        width = mask.shape[1]
        columns = torch.arange(width, device=mask.device)
        starts, ends = shown_spans(shown, columns, from_start, to_end)
        kept = (columns >= starts[:, None]) & (columns < ends[:, None])
        rows = kept.view(-1).nonzero()[:, 0]
        none = rows.shape[0] == 0
        if none:
            rows = torch.zeros(1, dtype=torch.int64, device=mask.device)
        seen = shown.reshape(-1)[rows]
        made = {
            "bounds": bounds_of(ends - starts), "starts": starts, "positions": rows % width,
            "sequence_of": rows // width, "columns": columns,
        }  # fmt: skip
        return cls(made, rows, None if bool(seen.all()) else seen)

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device) -> Mixture:
        """Return the `Mixture` of all tokens of sequences of these lengths, each >= 0."""
        each = torch.tensor(lengths, dtype=torch.int64, device=device)
        bounds, count = bounds_of(each), len(lengths)
        sequence_of = torch.repeat_interleave(torch.arange(count, device=device), each)
        positions = torch.arange(sequence_of.shape[0], device=device) - bounds[sequence_of]
        if not sequence_of.shape[0]:
            sequence_of = positions = torch.zeros(1, dtype=torch.int64, device=device)
        columns = torch.arange(max(1, *lengths), device=device)
        starts = torch.zeros(count, dtype=torch.int64, device=device)
        made = {
            "bounds": bounds, "starts": starts, "positions": positions,
            "sequence_of": sequence_of, "columns": columns,
        }  # fmt: skip
        return cls(made, None, None)

    def take(self, padded: torch.Tensor, batch: int) -> torch.Tensor:
        """Gather the rows of a tensor (batch or 1, seq, ...) by token: (1, tokens, ...)."""
        assert self.rows is not None
        whole = padded.expand(batch, *padded.shape[1:])
        return whole.reshape(-1, *padded.shape[2:])[self.rows].unsqueeze(0)

    def put(self, tokens: torch.Tensor, batch: int) -> torch.Tensor:
        """Scatter rows (tokens, ...) to (batch * seq, ...); other rows are zeros."""
        assert self.rows is not None
        count = batch * self.made["columns"].shape[0]
        if self.shown is None and tokens.device.type == "cpu" and not tokens.is_complex():
            whole = tokens.new_empty(count, *tokens.shape[1:])
            self._copy_spans(tokens, whole)
            return whole
        whole = tokens.new_zeros(count, *tokens.shape[1:])
        if self.shown is None:
            whole[self.rows] = tokens
        else:
            whole[self.rows[self.shown]] = tokens[self.shown]
        return whole

    def _copy_spans(self, tokens: torch.Tensor, whole: torch.Tensor) -> None:
        """Copy each sequence's rows to its place and zero the others, without PyTorch's threads:
        they would spin for milliseconds afterwards, on the cores that the next program needs."""
        given, made = _bytes_of(tokens), _bytes_of(whole)
        bounds, width, at = self.made["bounds"].tolist(), self.made["columns"].shape[0], 0
        for k, start in enumerate(self.made["starts"].tolist()):
            begin, length = k * width + start, bounds[k + 1] - bounds[k]
            made[at:begin] = 0
            made[begin : begin + length] = given[bounds[k] : bounds[k + 1]]
            at = begin + length
        made[at:] = 0


def _bytes_of(x: torch.Tensor) -> np.ndarray:
    """Return the bytes of a tensor's rows, which share its memory if it is contiguous: (rows,
    bytes of one)."""
    nbytes = x[:1].numel() * x.element_size()
    flat = x.detach().reshape(-1)
    if flat.stride(0) != 1:  # also of one element
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().reshape(x.shape[0], nbytes)


def shown_spans(
    shown: torch.Tensor, columns: torch.Tensor, from_start: bool, to_end: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for each row of `shown`, bool (batch, seq), its first column and the one after its
    last, int64 (batch,) each; 0 and 0 for an empty row.

    columns: int64, 0 to seq - 1.
    from_start, to_end: extend to the first or the last column.
    """
    width = shown.shape[1]
    ends = torch.where(shown, columns + 1, 0).amax(1)
    starts = torch.where(shown, columns, width).amin(1)
    empty = ends == 0
    starts = torch.zeros_like(starts) if from_start else starts.masked_fill_(empty, 0)
    return starts, torch.where(empty, 0, width) if to_end else ends


def bounds_of(lengths: torch.Tensor) -> torch.Tensor:
    """Return where sequences begin and the last ends, int64 (sequences + 1)."""
    return torch.constant_pad_nd(lengths.cumsum(0), (1, 0))


def require_binary(holds: bool) -> None:
    """Raise InputError if a mask has values other than 0 and 1."""
    if not holds:
        raise InputError(
            "attention_mask has other values than 0 and 1, and padding='packed' leaves out "
            "tokens by it: pass a mask of zeros and ones"
        )
