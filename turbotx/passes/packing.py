"""Packing: how a call over (batch, seq) becomes one over tokens, and back, as plain data.

In: nothing; these are types, which `pack` makes, `runtime.packed_program` goes by and a saved file
holds. Out: for example::

    TokenPacking(mask=1, batch="batch", seq="seq", inputs=(PackedInput("ids_tokens", 0, True), ...
"""

from __future__ import annotations

from dataclasses import dataclass

MASK = "attention_mask"
"""The argument of a call that says which of its tokens there are."""


@dataclass(frozen=True)
class PackedInput:
    """What a packed program is given. source: the place of the call's tensor whose rows it takes by
    token, or that it takes as it is; None for what is made of the mask, by its name ("bounds")."""

    name: str
    source: int | None
    by_token: bool


@dataclass(frozen=True)
class PackedOutput:
    """A leaf of (tokens, ...): the dims of the model's own leaf that its tokens are spread over.

    batch: None where rows and columns are one dim, at `columns`.
    """

    batch: int | None
    columns: int


@dataclass(frozen=True)
class TokenPacking:
    """How a call becomes one of a packed program, and back.

    mask: the place of the mask among the call's tensors. outputs: by leaf, None for one that is as
    the model's own. from_start, to_end: columns before the first, or behind the last, token that
    the mask shows are kept, since the model counts or looks at them. spare: which of batch and seq
    may be larger than the call's (`passes.spare_rows`). extents: by leaf the dims that those are.
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
