"""Packed call: sequences one behind the other, lists of them or nested tensors, without padding.

In: an engine of padding="packed", and for each input of the model its rows by token. Out: the
model's own output with (tokens, ...) in the place of (batch, seq, ...), or nested or listed as the
inputs were::

    fast.packed(input_ids=flat, lengths=[5, 500, 17]).last_hidden_state   # (522, 384)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from turbotx.capture.refusals import refuse_gradient
from turbotx.engine.engine import MOST_CHANGES, Engine
from turbotx.errors import CaptureError, InputError, ModelChangedError
from turbotx.passes.pack import MASK
from turbotx.runtime.mixture import Mixture
from turbotx.runtime.packed_program import PackedProgram


@dataclass(frozen=True)
class _Sequences:
    """Inputs by token: `kind` is "flat", "nested" or "listed"."""

    kind: str
    lengths: list[int]
    rows: dict[str, torch.Tensor]
    others: dict[str, Any]

    def wrap(self, rows: torch.Tensor) -> Any:
        """Return rows by token as the inputs were given."""
        if self.kind == "listed":
            return list(rows.split(self.lengths))
        if self.kind == "nested":
            return torch.nested.nested_tensor_from_jagged(
                rows, lengths_to_offsets(self.lengths, rows.device)
            )
        return rows


def lengths_to_offsets(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return where sequences of these lengths begin and end, int64 (sequences + 1)."""
    each = torch.tensor(lengths, dtype=torch.int64, device=device)
    return torch.nn.functional.pad(each.cumsum(0), (1, 0))


def call_packed(
    engine: Engine, lengths: Sequence[int] | torch.Tensor | None, given: Mapping[str, Any]
) -> Any:
    """Run a call whose inputs have a row a token: what each would have in the padded call whose
    sequences are filled up on the right.

    lengths: of the sequences, for flat inputs (tokens, ...). Raises InputError where inputs do not
    fit together, or the model looks at the last column, which a padded call fills up; PackError
    where its graph does not keep tokens apart.
    """
    if engine.options.padding != "packed":
        raise InputError('packed() is of a module that was made by optimize(padding="packed")')
    if MASK in given:
        raise InputError(f"packed() takes no {MASK}: every token that it is given is one")
    found = _read(lengths, given)
    if torch.is_grad_enabled() and any(t.requires_grad for t in found.rows.values()):
        refuse_gradient()
    for _ in range(MOST_CHANGES):
        standing, by_token = _stand_in(found)
        variant, program, binding, tensors = engine.check((), standing)
        assert isinstance(program, PackedProgram)
        if program.packing.to_end:
            raise InputError(
                f"{type(engine.model).__name__} looks at the last column of a call, which is "
                "padding for all but the longest sequence: pass a padded call and its mask"
            )
        packed = [by_token.get(id(t), t) for t in tensors]
        mixture = Mixture.of_lengths(found.lengths, tensors[0].device)
        try:
            with torch.no_grad():
                leaves = program.run_mixture(binding.dims, mixture, packed)
        except ModelChangedError as error:
            engine._forget(variant, error)
            continue
        count = sum(found.lengths)
        outputs = [
            leaf if kind is None else found.wrap(leaf[:count])
            for leaf, kind in zip(leaves, program.packing.outputs, strict=True)
        ]
        return pytree.tree_unflatten(outputs, variant.out_spec)
    raise CaptureError(f"{type(engine.model).__name__} is converted while it is called")


def _read(lengths: Sequence[int] | torch.Tensor | None, given: Mapping[str, Any]) -> _Sequences:
    """Return the inputs as rows by token; raise InputError where their lengths differ."""
    kind, counted, rows, others = "flat", None, dict[str, torch.Tensor](), dict[str, Any]()
    if lengths is not None:
        counted = [
            int(n) for n in (lengths.tolist() if isinstance(lengths, torch.Tensor) else lengths)
        ]
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
    if not counted or min(counted) < 0:
        raise InputError(
            "packed() needs the lengths of at least one sequence: pass lengths=[...] beside flat "
            f"inputs, nested tensors of layout torch.jagged, or lists of tensors, not {counted}"
        )
    if kind == "flat":
        total = sum(counted)
        for name, value in others.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == total:
                rows[name] = value
        others = {n: v for n, v in others.items() if n not in rows}
        if not rows:
            raise InputError(f"no input has {total} rows, the sum of lengths={counted}")
    return _Sequences(kind, counted, rows, others)


def _take_nested(name: str, value: Any) -> tuple[list[int], torch.Tensor]:
    plain = value.layout is torch.jagged and value.lengths() is None
    if not plain or getattr(value, "_ragged_idx", 1) != 1:  # torch's own, no public name
        raise InputError(f"{name} is a nested tensor of another layout than torch.jagged")
    return value.offsets().diff().tolist(), value.values()


def _take_listed(name: str, value: Sequence[torch.Tensor]) -> tuple[list[int], torch.Tensor]:
    if not value or any(x.ndim < 1 or x.shape[1:] != value[0].shape[1:] for x in value):
        raise InputError(f"{name} is a list of tensors that are not (length, ...) alike")
    return [x.shape[0] for x in value], torch.cat(list(value))


def _stand_in(found: _Sequences) -> tuple[dict[str, Any], dict[int, torch.Tensor]]:
    """Return a padded call of the same kind, whose values nobody reads, and by the identity of its
    tensors the rows that they stand for."""
    count, longest = len(found.lengths), max(1, *found.lengths)
    standing, by_token = dict(found.others), dict[int, torch.Tensor]()
    for name, rows in found.rows.items():
        rows = rows if rows.shape[0] else rows.new_zeros(1, *rows.shape[1:])
        padded = standing[name] = rows.new_zeros(count, longest, *rows.shape[1:])
        by_token[id(padded)] = rows.unsqueeze(0)
    first = next(iter(found.rows.values()))
    shown = standing[MASK] = torch.ones(count, longest, dtype=torch.int64, device=first.device)
    total = next(iter(by_token.values())).shape[1]
    by_token[id(shown)] = shown.new_ones(1, total)
    return standing, by_token
