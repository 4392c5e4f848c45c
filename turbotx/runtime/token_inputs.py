"""Token inputs: the inputs of a packed call, and the padded call that represents it.

In: flat tensors and lengths, lists of tensors or nested tensors. Out: rows by token, and arguments
of an equivalent padded call, used to look up its program::

    StandIns().make(read_sequences([2, 1], None, {"input_ids": ids}))  # ids: (3,)
      ->  {"input_ids": zeros (2, 2), "attention_mask": ones (2, 2)}, {id of those: ids, ...}
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

from turbotx.errors import InputError
from turbotx.passes.packing import MASK
from turbotx.runtime.mixture import bounds_of
from turbotx.runtime.packed_program import PackedProgram


@dataclass(frozen=True)
class Sequences:
    """Inputs by token.

    kind: "flat", "nested" or "listed".
    lengths: numbers, or int64 on a device, which are never synchronized.
    longest: an upper bound of the lengths.
    """

    kind: str
    lengths: list[int] | torch.Tensor
    longest: int
    rows: dict[str, torch.Tensor]
    others: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Number of rows of each input by token."""
        return next(iter(self.rows.values())).shape[0]

    def wrap(self, rows: torch.Tensor) -> Any:
        """Return rows by token in the form of the inputs."""
        if self.kind == "listed":
            assert isinstance(self.lengths, list)
            return list(rows.split(self.lengths))
        if self.kind == "nested":
            return torch.nested.nested_tensor_from_jagged(
                rows, lengths_to_offsets(self.lengths, rows.device)
            )
        return rows


def lengths_to_offsets(lengths: Sequence[int] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the bounds of sequences with these lengths, int64 (sequences + 1)."""
    each = torch.as_tensor(lengths, dtype=torch.int64, device=device)
    return bounds_of(each)


def read_sequences(
    lengths: Sequence[int] | torch.Tensor | None, longest: int | None, given: Mapping[str, Any]
) -> Sequences:
    """Return the inputs as rows by token; raise InputError if their lengths differ."""
    if MASK in given:
        raise InputError(f"packed() takes no {MASK}: all tokens that it gets are shown")
    kind, counted, rows, others = "flat", None, dict[str, torch.Tensor](), dict[str, Any]()
    if longest is not None and not isinstance(longest, int):
        raise InputError(f"longest is a whole number of tokens, not {longest!r}")
    if longest is not None and _is_on_gpu(lengths):
        return _read_on_device(lengths, longest, given)
    if lengths is not None:
        counted = _read_lengths(lengths)
    for name, value in given.items():
        nested = isinstance(value, torch.Tensor) and value.is_nested
        listed = isinstance(value, (list, tuple)) and all(
            isinstance(x, torch.Tensor) for x in value
        )
        if not nested and not listed:
            others[name] = value
            continue
        kind = "nested" if nested else "listed"
        own, rows[name] = _take_nested(name, value) if nested else _take_listed(name, value)
        if counted is not None and own != counted:
            raise InputError(f"{name} has sequences of the lengths {own}, and others {counted}")
        counted = own
    if not counted:
        raise InputError(
            "packed() needs the lengths of at least one sequence: pass lengths=[...] beside flat "
            f"inputs, nested tensors of layout torch.jagged, or lists of tensors, not {counted}"
        )
    if longest is not None and longest < max(counted):
        raise InputError(f"longest={longest}, and a sequence has {max(counted)} tokens")
    flat, others = _split_rows(others, sum(counted))
    rows |= flat
    if not rows:
        raise InputError(f"no input has {sum(counted)} rows, the sum of lengths={counted}")
    return Sequences(kind, counted, max(counted), rows, others)


def _read_lengths(lengths: Any) -> list[int]:
    """Return lengths as numbers; raise InputError unless they are whole, and 0 or more."""
    shown = lengths
    try:
        shown = lengths.tolist() if hasattr(lengths, "tolist") else list(lengths)
        counted = [operator.index(n) for n in shown]
    except (TypeError, NotImplementedError):  # NotImplementedError: on a device without values
        counted = [-1]
    if min(counted, default=0) < 0 or any(isinstance(n, bool) for n in shown):
        raise InputError(
            "packed() takes lengths as one whole number of tokens, 0 or more, for each sequence, "
            f"not {shown!r}"
        )
    return counted


def _is_on_gpu(lengths: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(lengths, torch.Tensor) and lengths.is_cuda


def _read_on_device(lengths: torch.Tensor, longest: int, given: Mapping[str, Any]) -> Sequences:
    """Return flat inputs with unread lengths on a device; the first tensor's rows are the
    tokens."""
    tensors = [x for x in given.values() if isinstance(x, torch.Tensor) and x.ndim]
    whole = not (lengths.is_floating_point() or lengths.dtype is torch.bool)
    if lengths.ndim != 1 or not lengths.shape[0] or not whole or not tensors:
        raise InputError(
            "packed() takes lengths on a GPU as whole numbers (sequences,), of at least one "
            f"sequence, beside flat inputs, not {lengths.dtype} {tuple(lengths.shape)}"
        )
    rows, others = _split_rows(given, tensors[0].shape[0])
    return Sequences("flat", lengths, longest, rows, others)


def _split_rows(
    given: Mapping[str, Any], total: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors with `total` rows, and the other arguments."""
    rows = {
        name: value for name, value in given.items()
        if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == total
    }  # fmt: skip
    return rows, {n: v for n, v in given.items() if n not in rows}


def _take_nested(name: str, value: Any) -> tuple[list[int], torch.Tensor]:
    plain = value.layout is torch.jagged and value.lengths() is None
    if not plain or getattr(value, "_ragged_idx", 1) != 1:  # private attribute of torch
        raise InputError(f"{name} is a nested tensor of another layout than torch.jagged")
    return value.offsets().diff().tolist(), value.values()


def _take_listed(name: str, value: Sequence[torch.Tensor]) -> tuple[list[int], torch.Tensor]:
    alike = not any(
        x.is_nested or x.ndim < 1 or x.shape[1:] != value[0].shape[1:]
        or x.device != value[0].device for x in value
    )  # fmt: skip
    if not value or not alike:
        raise InputError(
            f"{name} is a list of tensors that are not (length, ...) alike, on one device"
        )
    return [x.shape[0] for x in value], torch.cat(list(value))


def run_sequences(
    program: PackedProgram, dims: Sequence[int], found: Sequences, tensors: Sequence[torch.Tensor],
    by_token: Mapping[int, torch.Tensor], name: str,
) -> tuple[list[Any], Sequence[int]]:  # fmt: skip
    """Run a packed program; return its leaves, rows by token in the form of the inputs, and the
    sizes that stand for the call's.

    tensors: those of the padded call that represents the sequences, of sizes `dims`.
    by_token: see `StandIns`.
    name: of the model, for the InputError if it reads the last column, which is padding in a padded
    call.
    """
    if program.packing.to_end:
        raise InputError(
            f"{name} looks at the last column of a call, which is padding for all but the longest "
            "sequence: pass a padded call and its mask"
        )
    for given in program.packing.inputs:
        if given.source is not None and not given.by_token and given.name in program.by_column:
            raise InputError(
                f"{given.name} has one row for each column of the longest sequence: packed() takes "
                f"it with one row for each of the {found.tokens} tokens"
            )
    packed = [by_token.get(id(t), t) for t in tensors]
    dims = program.sizes_of(dims, len(found.lengths), max(1, found.longest))
    with torch.no_grad():
        mixture = program.of_lengths(found.lengths, found.tokens, found.longest, tensors[0].device)
        leaves = program.run_mixture(dims, mixture, packed)
    kinds = program.packing.outputs
    return [
        leaf if kind is None else found.wrap(leaf[: found.tokens])
        for leaf, kind in zip(leaves, kinds, strict=True)
    ], dims


class StandIns:
    """Padded calls that represent packed ones, as large as the largest so far, so that only few of
    them have new sizes."""

    def __init__(self) -> None:
        self._count = self._longest = 1
        self._tensors: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    def make(self, found: Sequences) -> tuple[dict[str, Any], dict[int, torch.Tensor]]:
        """Return a padded call with at least as many sequences and columns as before, whose values
        are never read; and, by id of its tensors, the rows that they represent."""
        standing, by_token = dict[str, Any](), dict[int, torch.Tensor]()
        some = next(iter(found.rows.values()))
        ones = torch.ones(max(1, some.shape[0]), dtype=torch.int64, device=some.device)
        with self._lock:
            self._count = max(self._count, len(found.lengths))
            self._longest = max(self._longest, found.longest)
            for name, rows in {**found.rows, MASK: ones}.items():
                rows = rows if rows.shape[0] else rows.new_zeros(1, *rows.shape[1:])
                padded = standing[name] = self._padded(name, rows)
                by_token[id(padded)] = rows.unsqueeze(0)
        return {**standing, **found.others}, by_token  # in the order of a padded call

    def _padded(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        shape, made = (self._count, self._longest, *rows.shape[1:]), self._tensors.get(name)
        wanted = (shape, rows.dtype, rows.device)
        if made is None or (made.shape, made.dtype, made.device) != wanted:
            made = self._tensors[name] = rows.new_full(shape, name == MASK)
        return made
