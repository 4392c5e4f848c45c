"""Guards on positions: a size that says where to read is checked against the dim it reads from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import turbotx

SHAPES = ((7, 3), (3, 7), (5, 5), (9, 8), (4, 9), (8, 1), (1, 6))


def difference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x[:, len(y) - len(x) :] * 2


def difference_of_a_table(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    table = torch.arange(160.0)
    return table[len(x) - len(y) : len(x)].sum() + x.sum() + y.sum()


@pytest.mark.parametrize("function", [difference, difference_of_a_table])
@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[::-1]])
def test_a_slice_that_begins_at_a_difference_of_sizes(
    function: Callable[..., torch.Tensor], shapes: tuple[tuple[int, int], ...]
) -> None:
    """Whether it counts from the end differs from call to call, and no name of a size tells."""
    fast = turbotx.optimize(function)
    for a, b in shapes:
        x, y = torch.randn(a, 20), torch.randn(b)
        torch.testing.assert_close(fast(x, y), function(x, y))


def nth(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x[len(y)] * 2


def nth_from_the_end(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x[-len(y)] * 2


@pytest.mark.parametrize("function", [nth, nth_from_the_end])
def test_a_position_outside_of_its_dim_is_refused_as_in_eager(
    function: Callable[..., torch.Tensor],
) -> None:
    fast = turbotx.optimize(function)
    for a, b in ((9, 4), (5, 5), (4, 9), (7, 3), (2, 1), (1, 3), (6, 6)):
        x, y = torch.randn(a, 20), torch.randn(b)
        try:
            expected = function(x, y)
        except IndexError:
            with pytest.raises(turbotx.TurbotxError, match=r"out of range|out of bounds"):
                fast(x, y)
        else:
            assert torch.equal(fast(x, y), expected)


WRITES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a row": lambda x: x.select_scatter(torch.zeros(x.shape[1]), 0, 3),
    "a row from the end": lambda x: x.select_scatter(torch.zeros(x.shape[1]), 0, -4),
    "a row of a fixed size": lambda x: x.select_scatter(torch.ones(3), 0, -1),
    "a column by a size": lambda x: x.select_scatter(torch.zeros(x.shape[0]), 1, x.shape[0]),
    "rows": lambda x: x.slice_scatter(torch.zeros(2, x.shape[1]), 0, 2, 4),
    "rows from the end": lambda x: x.slice_scatter(torch.zeros(2, x.shape[1]), 0, -2),
    "rows by sizes": lambda x: x.slice_scatter(
        torch.ones(2, x.shape[1]), 0, x.shape[1] - 1, x.shape[1] + 1
    ),
    "every other row": lambda x: x.slice_scatter(torch.zeros(2, x.shape[1]), 0, 1, None, 2),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_has_a_place(name: str) -> None:
    """Decompositions of these ops write nothing outside of a dim, where eager mode raises."""
    function = WRITES[name]
    fast, raised = turbotx.optimize(function), 0
    for size in ((4, 5), (5, 3), (5, 6), (3, 3), (4, 4), (1, 2), (2, 1), (0, 3), (3, 2)):
        x = torch.randn(size)
        try:
            expected = function(x)
        except (IndexError, RuntimeError):
            raised += 1
            with pytest.raises(turbotx.TurbotxError):
                fast(x)
        else:
            assert torch.equal(fast(x), expected)
    assert 0 < raised < 8 and fast.stats()["captures"] <= 4
