"""Packed ops: written by `passes.pack`, over the tokens of many sequences on one axis.

In: tensors of (1, ..., tokens, ...), and `bounds`, int64 (sequences + 1): sequence n has tokens
[bounds[n], bounds[n + 1]), possibly none. Out: the op applied to every sequence, for example::

    packed_attention(q, k, v, keys, None, None, bounds, starts, scale=0.125)
    sequence_sum(x, bounds, 1)  # (sequences, hidden)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from turbotx.ir.attention_ops import attention


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor | None,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    bounds: torch.Tensor,
    starts: torch.Tensor,
    **said: Any,
) -> torch.Tensor:
    """Return `attention_ops.attention` of each sequence on its own, (1, tokens, heads, head_dim).

    q, k, v: (1, heads or kv_heads, tokens, head_dim).
    keys: bool (1, 1, 1, tokens), or None for all of a sequence's keys.
    bias: shared by all sequences, (1, heads or 1, columns or 1, columns or 1), indexed by the
    columns of query and key. A sequence's first token has column starts[n], int64 (sequences,),
    the following ones the next columns.
    said: keyword arguments of `attention`.
    """
    if isinstance(q, FakeTensor):  # bounds are unknown while tracing
        return q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])
    out = q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])
    columns = starts.tolist()
    for n, (begin, end) in enumerate(_ranges(bounds)):
        shown = None if keys is None else keys[..., begin:end]
        first = columns[n]
        last = first + end - begin
        added = bias
        if bias is not None:
            rows, places = (slice(first, last) if n > 1 else slice(None) for n in bias.shape[2:])
            added = bias[:, :, rows, places]
        out[:, begin:end] = attention(
            q[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end], shown, added, sinks, **said
        )
    return out


def sequence_sum(x: torch.Tensor, bounds: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the sum over each sequence's tokens along `dim`, (sequences, ...) without `dim`; zeros
    for an empty sequence.

    x: its first dim must be of size 1 and lie before `dim`.
    """
    return _by_sequence(x, bounds, dim, lambda part: part.sum(dim))


def sequence_max(x: torch.Tensor, bounds: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the maximum over each sequence, shaped as by `sequence_sum`; for an empty sequence,
    the dtype's minimum."""
    least = -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min

    def largest(part: torch.Tensor) -> torch.Tensor:
        return part.amax(dim) if part.shape[dim] else part.sum(dim).to(x.dtype).fill_(least)

    return _by_sequence(x, bounds, dim, largest)


def sequence_token(x: torch.Tensor, bounds: torch.Tensor, dim: int, last: bool) -> torch.Tensor:
    """Return the first or last token of each sequence, shaped as by `sequence_sum`; zeros for an
    empty one."""

    def token(part: torch.Tensor) -> torch.Tensor:
        if not part.shape[dim]:
            return part.sum(dim).to(x.dtype)
        return part.select(dim, -1 if last else 0)

    return _by_sequence(x, bounds, dim, token)


def sequence_cumsum(x: torch.Tensor, bounds: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the cumulative sum along `dim`, restarted with each sequence; int64 for integers.
    Tokens after the last sequence get 0."""
    if isinstance(x, FakeTensor):
        return x.cumsum(dim)
    whole = torch.zeros_like(x, dtype=x.cumsum(dim).dtype)
    for begin, end in _ranges(bounds):
        part = whole.narrow(dim, begin, end - begin)
        part.copy_(x.narrow(dim, begin, end - begin).cumsum(dim))
    return whole


def _by_sequence(
    x: torch.Tensor, bounds: torch.Tensor, dim: int, reduce: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    like = reduce(x)
    out = like.new_empty(bounds.shape[0] - 1, *like.shape[1:])
    if isinstance(x, FakeTensor):
        return out
    for n, (begin, end) in enumerate(_ranges(bounds)):
        out[n] = reduce(x.narrow(dim, begin, end - begin))[0]
    return out


def _ranges(bounds: torch.Tensor) -> Iterator[tuple[int, int]]:
    ends = bounds.tolist()
    return itertools.pairwise(ends)
