"""Mixtures: which tokens a mask shows, and rows from padded to tokens and back.

In: masks, lengths. Out: bounds, positions, and tensors that come back where they were.
"""

from __future__ import annotations

import pytest
import torch

from turbotx.errors import InputError
from turbotx.runtime.mixture import Mixture

MASK = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]])


def made(mixture: Mixture, name: str) -> list[int]:
    return mixture.made[name].tolist()


def test_tokens_from_the_first_to_the_last() -> None:
    mixture = Mixture.of_mask(MASK, from_start=False, to_end=False)
    assert made(mixture, "bounds") == [0, 2, 5, 5] and made(mixture, "starts") == [0, 1, 0]
    assert made(mixture, "positions") == [0, 1, 1, 2, 3]
    assert made(mixture, "sequence_of") == [0, 0, 1, 1, 1]
    assert mixture.shown is not None and mixture.shown.tolist() == [True] * 3 + [False, True]


@pytest.mark.parametrize(
    ("from_start", "to_end", "bounds"),
    [(True, False, [0, 2, 6, 6]), (False, True, [0, 4, 7, 7]), (True, True, [0, 4, 8, 8])],
)
def test_columns_that_the_model_looks_at(from_start: bool, to_end: bool, bounds: list[int]) -> None:
    assert made(Mixture.of_mask(MASK, from_start, to_end), "bounds") == bounds


def test_rows_come_back_and_padding_is_zero() -> None:
    mixture, x = Mixture.of_mask(MASK, False, False), torch.randn(3, 4, 2)
    back = mixture.put(mixture.take(x, 3)[0], 3).view(3, 4, 2)
    assert torch.equal(back, x * MASK[:, :, None])


SPANS = [
    [[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]], [[1]], [[0, 1, 1], [1, 1, 0]]
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(5,), (), (0,), (2, 3)], ids=str)
def test_spans_are_copied_as_rows_are(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Whole spans take a way of their own, beside which an index tells the same."""
    for mask in map(torch.tensor, SPANS):
        mixture = Mixture.of_mask(mask, from_start=False, to_end=False)
        assert mixture.rows is not None and mixture.shown is None
        tokens = (3 * torch.randn(2 * mixture.tokens, *shape)).to(dtype)[::2]  # not contiguous
        expected = torch.zeros(mask.numel(), *shape, dtype=dtype)
        expected[mixture.rows] = tokens
        assert torch.equal(mixture.put(tokens, len(mask)), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_nothing_shown_is_one_token_of_no_sequence(dtype: torch.dtype) -> None:
    mixture = Mixture.of_mask(torch.zeros(2, 3, dtype=dtype), False, False)
    assert mixture.tokens == 1 and made(mixture, "bounds") == [0, 0, 0]
    assert not mixture.put(torch.ones(1, 5), 2).any()


def test_other_values_are_refused() -> None:
    with pytest.raises(InputError, match="other values than 0 and 1"):
        Mixture.of_mask(torch.tensor([[1, 2]]), False, False)


def test_lengths() -> None:
    mixture = Mixture.of_lengths([2, 0, 1], torch.device("cpu"))
    assert made(mixture, "bounds") == [0, 2, 2, 3] and made(mixture, "positions") == [0, 1, 0]
    assert made(mixture, "columns") == [0, 1]
    assert Mixture.of_lengths([0, 0], torch.device("cpu")).tokens == 1
