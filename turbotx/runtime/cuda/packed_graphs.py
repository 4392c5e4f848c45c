"""Packed graphs: a packed program on a GPU, whose calls of many sizes share a few CUDA graphs.

In: a mask, or lengths, on the device. Out: as `PackedProgram`'s; the token axis ends in at most 1/8
of tokens that belong to no sequence, so that the number of tokens is one of a few::

    room_for(5000)  ->  5008        room_for(5010)  ->  5632        room_for(7)  ->  16
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from turbotx.errors import DeviceError, InputError
from turbotx.memory.pool import ChunkPool
from turbotx.passes.pack import TokenPacking
from turbotx.program.executable import Executable
from turbotx.runtime.cuda.cuda_graphs import CudaGraphProgram, GraphCache
from turbotx.runtime.cuda.queue import CudaQueue
from turbotx.runtime.mixture import require_binary
from turbotx.runtime.packed_program import PackedProgram
from turbotx.runtime.watch import Watch

TILE = 16
"""Tokens that a matrix unit takes at once: fewer take as long."""
FEW = 128
"""Up to here the number of tokens is rounded up to tiles, which is more than 1/8 of some."""
SEQUENCES, COLUMNS = 32, 64
"""The least room for sequences and columns; above it is a power of two. Each sequence that is not
there costs attention one program a head, which sees that it has nothing to do."""


@functools.cache
def _rooms() -> tuple[int, ...]:
    found = list(range(TILE, FEW + 1, TILE))
    while found[-1] < 1 << 31:
        least = found[-1] + 1
        found.append((least + least // 8) // TILE * TILE)
    return tuple(found)


def room_for(tokens: int) -> int:
    """Return how many tokens a call of so many runs with."""
    rooms = _rooms()
    return rooms[bisect_left(rooms, tokens)]


def _power(count: int, least: int) -> int:
    return max(least, 1 << (count - 1).bit_length())


@dataclass(frozen=True)
class DeviceMixture:
    """A `Mixture` whose numbers are on a device, but that of its tokens.

    counts: (sequences,), starts: the column of each one's first token, None for 0. mask: (batch,
    seq), which tokens of a padded call are shown, None where none is padded.
    """

    tokens: int
    counts: torch.Tensor
    starts: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def make(self, sequences: int, columns: int, room: int) -> dict[str, torch.Tensor]:
        """Return what a packed program reads of sequences, at the sizes that it runs with."""
        new = functools.partial(torch.zeros, dtype=torch.int64, device=self.counts.device)
        counts = new(sequences + 1)
        counts[1 : 1 + self.counts.shape[0]] = self.counts
        # Whatever lengths on a device say: no bound lies behind the last token that there is.
        bounds = counts.cumsum(0).clamp_(max=self.tokens)
        starts = new(sequences)
        if self.starts is not None:
            starts[: self.counts.shape[0]] = self.starts
        places = torch.arange(room, device=counts.device)
        sequence_of = torch.searchsorted(bounds[1:-1], places, right=True)
        positions = places - (bounds[:-1] - starts)[sequence_of]
        # A token of no sequence looks up what the first column does.
        positions.masked_fill_(places >= self.tokens, 0)
        return {
            "bounds": bounds, "starts": starts, "sequence_of": sequence_of,
            "positions": positions, "columns": torch.arange(columns, device=counts.device),
        }  # fmt: skip

    def take(self, given: torch.Tensor, batch: int, made: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the rows of a tensor, (batch or 1, seq, ...) or (1, tokens, ...), by token, with
        the room's other tokens behind them."""
        room = made["positions"].shape[0]
        if self.mask is None:
            if given.shape[1] == room:
                return given
            rows = given.new_zeros(1, room, *given.shape[2:])
            rows[:, : self.tokens] = given[:, : self.tokens]
            return rows
        whole = given.expand(batch, *given.shape[1:])
        at = made["sequence_of"].clamp(max=batch - 1) * given.shape[1] + made["positions"]
        return whole.reshape(-1, *given.shape[2:])[at].unsqueeze(0)

    def put(self, tokens: torch.Tensor, batch: int) -> torch.Tensor:
        """Return rows (tokens, ...) where they lie in (batch * seq, ...), zeros elsewhere."""
        assert self.mask is not None and self.starts is not None
        columns = torch.arange(self.mask.shape[1], device=tokens.device)
        begins = self.counts.cumsum(0) - self.counts - self.starts
        at = (begins[:, None] + columns).masked_fill_(~self.mask, 0)
        hidden = ~self.mask.view(-1, *[1] * (tokens.ndim - 1))
        return tokens.index_select(0, at.view(-1)).masked_fill_(hidden, 0)


@dataclass(frozen=True)
class _Doubt:
    """Lengths of a call on their way to the host. event: behind their copy."""

    told: torch.Tensor
    event: torch.cuda.Event | None
    tokens: int
    longest: int

    def is_told(self) -> bool:
        return self.event is None or self.event.query()

    def holds(self) -> bool:
        each = self.told.tolist()
        return sum(each) == self.tokens and min(each) >= 0 and max(each) <= self.longest


class PackedGraphProgram(PackedProgram, CudaGraphProgram):
    """A packed program on a GPU. siblings: the programs of one call, among which its number of
    tokens chooses, this one too."""

    siblings: Sequence[PackedGraphProgram]

    def __init__(
        self, executable: Executable, runtime: CudaQueue, pool: ChunkPool, max_shapes: int,
        graphs: GraphCache, packing: TokenPacking,
    ) -> None:  # fmt: skip
        CudaGraphProgram.__init__(self, executable, runtime, pool, max_shapes, graphs)
        self._take_up(packing)
        self._needs_columns = any(x.name == "columns" for x in packing.inputs)
        self.siblings = (self,)
        self._doubts: deque[_Doubt] = deque()

    def room_of(self, dims: Sequence[int], tokens: int) -> tuple[int, ...]:
        """Return the dims that a call of these dims, and so many tokens, runs with."""
        spare, seq = self.packing.spare, self.packing.seq
        found = [*dims, room_for(tokens)]
        for k, name in enumerate(self.dims[:-1]):
            if name in spare:
                columns = _power(dims[k], COLUMNS) if self._needs_columns else 1
                found[k] = columns if name == seq else _power(dims[k], SEQUENCES)
        if any(rest < 0 for rest in self._requirements(*found)):  # of what is added alone, perhaps
            found = [*dims, room_for(tokens)]
        return tuple(found)

    def reserve(self, binding: Any) -> None:
        """Map the memory of a shape all of whose columns are tokens now, for good."""
        *dims, _ = binding.dims
        room = self.room_of(dims, dims[self._batch] * dims[self._seq])
        CudaGraphProgram.reserve(self, CudaGraphProgram.bind(self, room))

    def find_mixture(self, dims: Sequence[int], tensors: Sequence[torch.Tensor]) -> Any:
        """Return the tokens of a padded call, as `PackedProgram` does; waits for the mask, once."""
        self._refuse_capture("how many tokens a padded call has is known once its mask is read")
        return super().find_mixture(dims, tensors)

    def of_mask(self, mask: torch.Tensor) -> Any:
        """Return the tokens that a mask (batch, seq) shows; raise InputError for other values than
        0 and 1."""
        shown, width = mask.to(torch.bool), mask.shape[1]
        columns = torch.arange(width, device=mask.device)
        ends = torch.where(shown, columns + 1, 0).amax(1)
        starts = torch.where(shown, columns, width).amin(1)
        empty = ends == 0
        starts = torch.zeros_like(starts) if self.packing.from_start else starts
        starts = starts.masked_fill_(empty, 0)
        if self.packing.to_end:
            ends = torch.where(empty, 0, width)
        counts = ends - starts
        wrong = (mask != shown.to(mask.dtype)).any()
        tokens, others = torch.stack([counts.sum(), wrong.to(torch.int64)]).tolist()
        require_binary(not others)
        return DeviceMixture(tokens, counts, starts, shown)

    def of_lengths(
        self, lengths: Any, tokens: int, longest: int, device: torch.device
    ) -> DeviceMixture:
        """Return all tokens of sequences. Lengths on the device are not waited for: that they are
        none that do not fit is told by a later call, as InputError."""
        if not isinstance(lengths, torch.Tensor):
            self._refuse_capture("lengths on the host would be the graph's for good")
            counts = torch.tensor(lengths, dtype=torch.int64, pin_memory=device.type == "cuda")
            return DeviceMixture(tokens, counts.to(device, non_blocking=True))
        if not self.runtime.device.is_capturing():
            self._raise_doubts()
            told, event = lengths.to("cpu", non_blocking=True), None
            if lengths.is_cuda:
                event = torch.cuda.Event()
                event.record()
            self._doubts.append(_Doubt(told, event, tokens, longest))
        return DeviceMixture(tokens, lengths.to(torch.int64).clamp(0, longest))

    def _raise_doubts(self) -> None:
        """Raise InputError where lengths that have arrived from the device did not fit."""
        while self._doubts and self._doubts[0].is_told():
            doubt = self._doubts.popleft()
            if not doubt.holds():
                raise InputError(
                    f"an earlier call of packed() was given {doubt.tokens} rows, "
                    f"longest={doubt.longest} and lengths on the device of {doubt.told.tolist()}, "
                    "which do not fit: what it returned is wrong"
                )

    def _refuse_capture(self, why: str) -> None:
        if self.runtime.device.is_capturing():
            raise DeviceError(
                f"a CUDA graph is being captured around a packed call, and {why}: pass packed() "
                "lengths on the device, and longest="
            )

    def run_mixture(
        self, dims: Sequence[int], mixture: Any, tensors: Sequence[torch.Tensor],
        ticks: Any = None, watch: Watch | None = None,
    ) -> list[Any]:  # fmt: skip
        """Return the packed program's leaves, (tokens, ...) and more where they are by token."""
        room = self.room_of(dims, mixture.tokens)
        program = next(p for p in self.siblings if p.serves(room))
        made = mixture.make(room[self._batch], room[self._seq], room[-1])
        given = []
        for x in self.packing.inputs:
            if x.source is None:
                given.append(made[x.name])
            elif x.by_token:
                given.append(mixture.take(tensors[x.source], dims[self._batch], made))
            else:
                given.append(tensors[x.source])
        bound = CudaGraphProgram.bind(program, room)
        leaves = CudaGraphProgram.run(program, bound, given, ticks, watch)
        sizes = dict(zip(self.dims, dims, strict=False))
        for k, own in enumerate(self.packing.extents):
            for d, name in own:
                leaves[k] = leaves[k].narrow(d, 0, sizes[name])
        return leaves
