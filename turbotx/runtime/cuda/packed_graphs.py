"""Packed graphs: a packed program on a GPU; calls with different token counts share CUDA graphs.

In: a mask or lengths on the device. Out: the same as `PackedProgram`. The token axis is padded by
at most 1/8, so that only a few token counts ("rooms") occur::

    room_for(5000)  ->  5008        room_for(5010)  ->  5632        room_for(7)  ->  16
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from turbotx.errors import DeviceError, InputError
from turbotx.memory.pool import ChunkPool
from turbotx.passes.packing import TokenPacking
from turbotx.program.executable import Executable
from turbotx.runtime.binding import Binding
from turbotx.runtime.cuda.cuda_graphs import CudaGraphProgram, GraphCache
from turbotx.runtime.cuda.queue import CudaQueue
from turbotx.runtime.mixture import require_binary, shown_spans
from turbotx.runtime.packed_program import PackedProgram
from turbotx.runtime.state import RunState
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
    """Return the padded number of tokens that a call with `tokens` runs with."""
    rooms = _rooms()
    return rooms[bisect_left(rooms, tokens)]


def _power(count: int, least: int) -> int:
    return max(least, 1 << (count - 1).bit_length())


@dataclass(frozen=True)
class DeviceMixture:
    """A `Mixture` with its lengths on a device; only the number of tokens is on the host.

    lengths: per sequence, numbers or an integer tensor (sequences,) on the device. starts: column
    of each sequence's first token, None for 0. mask: (batch, seq) of a padded call, else None.
    """

    tokens: int
    lengths: list[int] | torch.Tensor
    starts: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def lay_out(self, room: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return bounds (room + 1,) and starts (room,), int64; sequences beyond the call's are
        empty."""
        if not isinstance(self.lengths, torch.Tensor):
            bounds = [0, *itertools.accumulate(self.lengths)]
            numbers = bounds + [bounds[-1]] * (room + 1 - len(bounds)) + [0] * room
            made = torch.tensor(numbers, pin_memory=device.type == "cuda")
            both = made.to(device, non_blocking=True)
            return both[: room + 1], both[room + 1 :]
        both = torch.zeros(2 * room + 1, dtype=torch.int64, device=device)
        count, starts = self.lengths.shape[0], both[room + 1 :]
        both[1 : count + 1] = self.lengths
        if self.starts is not None:
            starts[:count] = self.starts
        # Clamp to the number of tokens, whatever the lengths on the device are.
        return both[: room + 1].cumsum(0).clamp_(max=self.tokens), starts

    def put(self, tokens: torch.Tensor, batch: int) -> torch.Tensor:
        """Return packed rows (tokens, ...) scattered to (batch * seq, ...), zeros elsewhere."""
        assert self.mask is not None and self.starts is not None
        assert isinstance(self.lengths, torch.Tensor)
        columns = torch.arange(self.mask.shape[1], device=tokens.device)
        begins = self.lengths.cumsum(0) - self.lengths - self.starts
        at = (begins[:, None] + columns).masked_fill_(~self.mask, 0)
        hidden = ~self.mask.view(-1, *[1] * (tokens.ndim - 1))
        return tokens.index_select(0, at.view(-1)).masked_fill_(hidden, 0)


class PackedInputs:
    """The inputs of a packed program, created on demand, for a padded number of tokens.

    given: the call's tensors, by index. place: arange(room), int64.
    """

    def __init__(
        self, packing: TokenPacking, mixture: DeviceMixture, given: Sequence[torch.Tensor],
        batch: int, sequences: int, columns: int, place: torch.Tensor,
    ) -> None:  # fmt: skip
        self.packing, self.mixture, self.given = packing, mixture, given
        self.batch, self.columns, self.place = batch, columns, place
        self.bounds, self.starts = mixture.lay_out(sequences, place.device)

    @functools.cached_property
    def all(self) -> list[torch.Tensor]:
        """Every input, in order."""
        own = make_places(self.bounds, self.starts, self.place)
        own |= {"columns": torch.arange(self.columns, device=self.place.device)}
        return [own[x.name] if x.source is None else self._fill(self.rows(x.source))
                if x.by_token else self.given[x.source] for x in self.packing.inputs]  # fmt: skip

    def rows(self, source: int) -> torch.Tensor:
        """Return an input's packed rows, (1, at least tokens, ...)."""
        given, mixture = self.given[source], self.mixture
        if mixture.mask is None:
            return given[:, : mixture.tokens]
        whole = given.expand(self.batch, *given.shape[1:])
        return whole.reshape(-1, *given.shape[2:])[self._padded_place].unsqueeze(0)

    @functools.cached_property
    def _padded_place(self) -> torch.Tensor:
        """Return each token's index in (batch * seq)."""
        made = make_places(self.bounds, self.starts, self.place)
        assert self.mixture.mask is not None
        row = made["sequence_of"].clamp_(max=self.batch - 1)
        return row.mul_(self.mixture.mask.shape[1]).add_(made["positions"])

    def _fill(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows padded with zeros to the room."""
        missing = self.place.shape[0] - rows.shape[1]
        return (
            torch.cat([rows, rows.new_zeros(1, missing, *rows.shape[2:])], 1) if missing else rows
        )


def make_places(
    bounds: torch.Tensor, starts: torch.Tensor, place: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the sequence inputs of a packed program: bounds, starts, and sequence_of and
    positions, int64 (room,)."""
    sequence_of = torch.searchsorted(bounds[1:-1], place, right=True)
    positions = place - (bounds[:-1] - starts)[sequence_of]
    # Padding tokens get position 0.
    positions.masked_fill_(place >= bounds[-1], 0)
    return {
        "bounds": bounds, "starts": starts, "sequence_of": sequence_of, "positions": positions,
    }  # fmt: skip


@dataclass(frozen=True)
class _Doubt:
    """Lengths of a call that are being copied to the host. event: recorded after the copy."""

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
    """A packed program on a GPU."""

    def __init__(
        self, executable: Executable, runtime: CudaQueue, pool: ChunkPool, max_shapes: int,
        graphs: GraphCache, packing: TokenPacking,
    ) -> None:  # fmt: skip
        CudaGraphProgram.__init__(self, executable, runtime, pool, max_shapes, graphs)
        self._take_up(packing)
        names = {x.name for x in packing.inputs if x.source is None}
        self._needs_columns = "columns" in names
        own = {packing.batch, packing.seq}
        self.takes_any_sizes = own <= set(packing.spare) and not self._needs_columns
        self._derives = {"bounds", "starts"} <= names
        """Whether a graph is given enough to make all else of."""
        self._places: dict[int, torch.Tensor] = {}
        self.siblings: list[PackedGraphProgram] = graphs.packed
        """All specializations of the call, including this one."""
        self.siblings.append(self)
        self._doubts: deque[_Doubt] = deque()

    def room_of(self, dims: Sequence[int], tokens: int) -> tuple[int, ...]:
        """Return the dims, padded to a room, that a call with these dims and tokens runs with."""
        spare, seq = self.packing.spare, self.packing.seq
        found = [*dims, room_for(tokens)]
        for k, name in enumerate(self.dims[:-1]):
            if name in spare:
                columns = _power(dims[k], COLUMNS) if self._needs_columns else 1
                found[k] = columns if name == seq else _power(dims[k], SEQUENCES)
        if any(rest < 0 for rest in self._requirements(*found)):  # perhaps due to the padding
            found = [*dims, room_for(tokens)]
        return tuple(found)

    def effective_dims(self, dims: Sequence[int]) -> Sequence[int]:
        """Return the dims that a call with these dims runs with, the number of tokens included."""
        *padded, tokens = dims
        return self.room_of(padded, tokens)

    def sizes_of(self, dims: Sequence[int], batch: int, seq: int) -> Sequence[int]:
        """Return the call's own dims, given its batch and seq, instead of those it was bound
        with."""
        if not self.takes_any_sizes:
            return dims
        named = zip(self.dims, dims, strict=False)
        own = dict.fromkeys(self.packing.spare, batch) | {self.packing.seq: seq}
        return [own.get(name, n) for name, n in named]

    def reserve(self, binding: Any) -> None:
        """Map the memory of a shape without padding now, permanently."""
        *dims, _ = binding.dims
        room = self.room_of(dims, dims[self._batch] * dims[self._seq])
        CudaGraphProgram.reserve(self, CudaGraphProgram.bind(self, room))

    def find_mixture(self, dims: Sequence[int], tensors: Sequence[torch.Tensor]) -> Any:
        """Return the tokens of a padded call, as `PackedProgram`; synchronizes once to read the
        mask."""
        self._refuse_capture("how many tokens a padded call has is known once its mask is read")
        self._raise_doubts()
        return super().find_mixture(dims, tensors)

    def of_mask(self, mask: torch.Tensor) -> Any:
        """Return the unmasked tokens of a mask (batch, seq); raise InputError for values other than
        0 and 1."""
        shown, columns = mask.to(torch.bool), torch.arange(mask.shape[1], device=mask.device)
        starts, ends = shown_spans(shown, columns, self.packing.from_start, self.packing.to_end)
        counts = ends - starts
        wrong = (mask != shown.to(mask.dtype)).any()
        tokens, others = torch.stack([counts.sum(), wrong.to(torch.int64)]).tolist()
        require_binary(not others)
        return DeviceMixture(tokens, counts, starts, shown)

    def of_lengths(
        self, lengths: Any, tokens: int, longest: int, device: torch.device
    ) -> DeviceMixture:
        """Return the tokens of sequences. Lengths on the device are not read synchronously: if they
        are invalid, a later call raises InputError."""
        if not isinstance(lengths, torch.Tensor):
            self._refuse_capture("lengths on the host would be the graph's for good")
            self._raise_doubts()
            return DeviceMixture(tokens, lengths)
        if not self.runtime.device.is_capturing():
            self._raise_doubts()
            told, event = lengths.to("cpu", non_blocking=True), None
            if lengths.is_cuda:
                event = torch.cuda.Event()
                event.record()
            self._doubts.append(_Doubt(told, event, tokens, longest))
        return DeviceMixture(tokens, lengths.to(torch.int64).clamp(0, longest))

    def _raise_doubts(self) -> None:
        """Raise InputError if lengths of an earlier call, now on the host, were invalid."""
        while self._doubts and self._doubts[0].is_told():
            doubt = self._doubts.popleft()
            if not doubt.holds():
                raise InputError(
                    f"an earlier call of packed() was given {doubt.tokens} rows, "
                    f"longest={doubt.longest} and lengths on the device of {doubt.told.tolist()}, "
                    "which do not fit: its results are wrong"
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
        """Run and return the packed program's leaves; those with a token axis may have padding
        tokens.

        With `watch` the launches run at the call's own sizes, without padding.
        """
        room, program = self.room_of(dims, mixture.tokens), self
        if watch is not None:
            room = (*dims, mixture.tokens)
        else:
            program = next(p for p in self.siblings if p.serves(room))
        place = program._places.get(room[-1])
        if place is None:
            where = self.runtime.torch_device
            place = program._places[room[-1]] = torch.arange(room[-1], device=where)
        sizes_of = (dims[self._batch], room[self._batch], room[self._seq])
        given: Any = PackedInputs(self.packing, mixture, tensors, *sizes_of, place)
        bound = CudaGraphProgram.bind(program, room)
        leaves = CudaGraphProgram.run(program, bound, given, ticks, watch)
        sizes = dict(zip(self.dims, dims, strict=False))
        for k, own in enumerate(self.packing.extents):
            for d, name in own:
                leaves[k] = leaves[k].narrow(d, 0, sizes[name])
        return leaves

    # --- inputs of a graph ---

    def in_memory(self, tensors: Any) -> Sequence[torch.Tensor]:
        """Return all inputs of a call as tensors."""
        return super().in_memory(tensors.all if isinstance(tensors, PackedInputs) else tensors)

    def _state(
        self, binding: Binding, arena: Any, inputs: Any, outputs: Sequence[torch.Tensor],
        given: Any = (),
    ) -> RunState:  # fmt: skip
        if isinstance(inputs, PackedInputs):  # a replayed call: no leaf is an input
            inputs = [None] * len(self._inputs)
        given = () if isinstance(given, PackedInputs) else given
        return super()._state(binding, arena, inputs, outputs, given)

    def _copied_in(
        self, inputs: list[torch.Tensor], tensors: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return copies of bounds, starts and the rows of the call's tokens; the graph derives the
        rest."""
        if not self._derives:
            return inputs, list(self.in_memory(tensors))
        into, given = [], []
        for view, x in zip(inputs, self.packing.inputs, strict=True):
            if x.source is None and x.name not in ("bounds", "starts"):
                continue
            if x.source is None:
                rows = tensors.bounds if x.name == "bounds" else tensors.starts
            elif x.by_token:
                rows = tensors.rows(x.source)[0]
                view = view[0, : rows.shape[0]]
            else:
                rows = tensors.given[x.source]
            if rows.numel():
                into.append(view)
                given.append(rows)
        return into, given

    def _derive(self, inputs: list[torch.Tensor]) -> None:
        """Queue the derivation of positions from bounds and starts, and zeroing of padding
        tokens."""
        if not self._derives:
            return
        named = dict(zip((x.name for x in self.packing.inputs), inputs, strict=True))
        rows = [view for view, x in zip(inputs, self.packing.inputs, strict=True) if x.by_token]
        place = self._places[rows[0].shape[1]]

        def make() -> None:
            found = make_places(named["bounds"], named["starts"], place)
            for name in ("positions", "sequence_of"):
                if name in named:
                    named[name].copy_(found[name])
            if "columns" in named:
                torch.arange(named["columns"].shape[0], out=named["columns"])
            beyond = place >= named["bounds"][-1]
            for view in rows:
                view.masked_fill_(beyond.view(1, -1, *[1] * (view.ndim - 2)), 0)

        self.runtime.device.call(make)
