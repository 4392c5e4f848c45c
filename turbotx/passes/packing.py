"""Packing: how a call over (batch, seq) is converted to one over tokens and back, as plain data.

In: nothing; these are types, made by `pack`, used by `runtime.packed_program` and stored in saved
files. Out, for example::

    TokenPacking(mask=1, batch="batch", seq="seq", inputs=(PackedInput("ids_tokens", 0, True), ...
"""

from __future__ import annotations

from dataclasses import dataclass

MASK = "attention_mask"
"""The argument of a call that says which positions are tokens."""


@dataclass(frozen=True)
class PackedInput:
    """An input of a packed program.

    source: index of the call's tensor that it is taken from; None for an input derived from the
    mask, by its name ("bounds").
    by_token: whether it is that tensor's rows at tokens, or the whole tensor.
    """

    name: str
    source: int | None
    by_token: bool


@dataclass(frozen=True)
class PackedOutput:
    """An output leaf of (tokens, ...): the dims of the model's own leaf over which tokens are
    scattered.

    batch: None if batch and columns are merged into the dim `columns`.
    """

    batch: int | None
    columns: int


@dataclass(frozen=True)
class TokenPacking:
    """How a call is converted to one of a packed program and back.

    mask: index of the mask among the call's tensors.
    outputs: by leaf, None for one that is the model's own.
    from_start, to_end: keep columns before the first or after the last unmasked token, because the
    model counts or reads them.
    spare: which of batch and seq may be larger than the call's (`passes.spare_rows`).
    extents: by leaf, the dims that have these sizes.
    """

    mask: int
    batch: str
    seq: str
    inputs: tuple[PackedInput, ...]
    outputs: tuple[PackedOutput | None, ...]
    from_start: bool
    to_end: bool
    spare: tuple[str, ...] = ()
    extents: tuple[tuple[tuple[int, str], ...], ...] = ()
