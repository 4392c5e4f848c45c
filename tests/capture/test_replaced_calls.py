"""A tensor of one integer as an index: its place is read at every call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import turbotx
from turbotx.errors import CaptureError, IndexOutOfRangeError

MODELS: list[Any] = [
    lambda x, i: x[:, i] * 2,
    lambda x, i: x[i],
    lambda x, i: x[..., i, :, None] + 1,
    lambda x, i: x[:, i, 1:],
    lambda x, i: x[None, torch.tensor([0, 1]), :, i],
    lambda x, i: x.select(1, i) + x.select(dim=2, index=i)[:, :1],
    lambda x, i: (x[:, i], (x + 1).mul_(2)),
    lambda x, i: x[:, x[0, :, 0].argmax()],
    lambda x, i: x.narrow(1, i, 1) + torch.narrow(input=x, dim=2, start=i % 2, length=2)[..., :1],
    lambda x, i: x.flip(1).narrow(1, i, x.shape[1] // 4),
]


def writes_to_the_part(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[:, i].add_(1)
    return y


def writes_to_a_view_of_the_part(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.narrow(1, i, 1)[0].zero_()
    return y.sum()


def writes_to_the_whole(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    y = x * 2
    part = y.select(1, i)[:, None]
    y.add_(1)
    return part


def writes_to_an_input(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    x[..., i].zero_()
    return x.new_ones(2)


def writes_to_what_nobody_reads(x: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x * 2
    part = y[:, i] + 1
    y.add_(1)
    return part.mul_(2), y, y[:, i]


def takes_a_copy_and_writes(x: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x * 2
    part = y[torch.tensor([0, 1]), i]
    y.add_(1)
    return part, y


def sets_numbers(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[:, i] = 1.0
    y[..., i, 1:3] = x[:, :2, :2].sum((1, 2), keepdim=True)[:, 0]
    return y


def sets_at_two_places(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[None, i, :, i] = x[0, :, 0]
    y[i % 2, ..., -1] = torch.arange(y.shape[1])
    return y


def sets_beside_rows(x: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y, rows = x * 2, torch.arange(x.shape[0])
    y[rows, i] = x[:, 0] + 1
    y[rows, :, i - 1] += 1
    return y, y[rows, i]


def adds_to_a_part(x: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x * 2
    before = y[:, i].clone()
    y[:, i] += 1
    y[:, i, 2:4] *= 3
    return before, y


def sets_in_a_view(x: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = (x * 2).long()
    z = y.transpose(0, 1)
    z[i] = 5
    return y, z


def sets_bools(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    y = x > 0
    y[:, i] = False
    y[:, i - 1] |= True
    return y


def reads_a_part_that_was_overwritten(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    y = x * 2
    part = y[:, i]
    y[:, i - 1] = 0
    return part


@pytest.mark.parametrize(
    "model",
    [sets_numbers, sets_at_two_places, sets_beside_rows, adds_to_a_part, sets_in_a_view,
     sets_bools],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_write_to_a_place_is_this_call_s(model: Any, dtype: torch.dtype) -> None:
    fast = turbotx.optimize(model)
    for place, shape in ((1, (3, 4, 5)), (2, (3, 4, 5)), (-1, (4, 3, 6)), (0, (1, 4, 5))):
        x, i = torch.randn(*shape, dtype=dtype), torch.tensor(place)
        try:
            right = model(x.clone(), i)
        except IndexError:
            continue
        came = fast(x, i)
        torch.testing.assert_close(came, right)
        layouts = [[y.stride() for y in pytree.tree_leaves(z)] for z in (came, right)]
        assert shape[0] == 1 or layouts[0] == layouts[1]


def test_a_write_outside_is_an_error() -> None:
    fast = turbotx.optimize(sets_numbers)
    with pytest.raises(IndexOutOfRangeError):
        fast(torch.randn(3, 4, 5), torch.tensor(4))


@pytest.mark.parametrize("model", MODELS)
def test_the_place_is_this_call_s(model: Any) -> None:
    fast = turbotx.optimize(model)
    for place, shape in ((1, (3, 4, 5)), (2, (3, 4, 5)), (-1, (4, 3, 6)), (0, (4, 3, 6))):
        x, i = torch.randn(*shape), torch.tensor(place)
        torch.testing.assert_close(fast(x, i), model(x, i))


@pytest.mark.parametrize(
    "model",
    [
        writes_to_the_part,
        writes_to_a_view_of_the_part,
        writes_to_the_whole,
        writes_to_an_input,
        reads_a_part_that_was_overwritten,
    ],
)
def test_a_write_that_eager_shows_elsewhere_is_refused(model: Any) -> None:
    fast = turbotx.optimize(model)
    with pytest.raises(CaptureError, match="takes a part of a tensor at an index that is a tensor"):
        fast(torch.randn(3, 4, 5), torch.tensor(2))


@pytest.mark.parametrize("model", [writes_to_what_nobody_reads, takes_a_copy_and_writes])
def test_other_writes_are_followed(model: Any) -> None:
    x, i = torch.randn(3, 4, 5), torch.tensor(2)
    torch.testing.assert_close(turbotx.optimize(model)(x, i), model(x, i))


def test_a_place_outside_is_an_error() -> None:
    fast = turbotx.optimize(lambda x, i: x[:, i])
    for place in (4, -5):
        with pytest.raises(IndexOutOfRangeError):
            fast(torch.randn(3, 4), torch.tensor(place))


def test_a_part_that_reaches_outside_is_an_error() -> None:
    fast = turbotx.optimize(lambda x, i: x.narrow(1, i, 2))
    for place in (3, -1, -5):
        with pytest.raises(IndexOutOfRangeError):
            fast(torch.randn(3, 4), torch.tensor(place))


def test_a_size_in_a_tensor_stays_a_size() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return x[torch.tensor(x.shape[0]) - 1] * 2

    fast = turbotx.optimize(model)
    for n in (3, 5):
        x = torch.randn(n, 2)
        torch.testing.assert_close(fast(x), model(x))


def test_data_is_read_and_written_as_in_eager_mode() -> None:
    layer = torch.nn.Linear(3, 3).eval()

    def function(x: torch.Tensor) -> Any:
        y = x.data * 2
        y.data[0] = 5.0
        z = torch.nn.functional.linear(x.T.data.T, layer.weight.data, layer.bias.data)
        return y, z, x.data.sum(0)

    fast = turbotx.optimize(function, backend="aten")
    for n in (3, 1, 2):
        x = torch.randn(n, 3)
        for came, wanted in zip(fast(x), function(x), strict=True):
            torch.testing.assert_close(came, wanted)
        with torch.no_grad():
            layer.weight.mul_(2)


def test_setting_data_is_refused_by_name() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.data = x
        return y

    with pytest.raises(CaptureError, match=r"sets the \.data of a tensor"):
        turbotx.optimize(function, backend="aten")(torch.ones(3))


def test_packed_sequences_are_refused_by_name() -> None:
    layer = torch.nn.GRU(3, 4, batch_first=True).eval()

    def function(x: torch.Tensor, lengths: torch.Tensor) -> Any:
        packed = torch.nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        return layer(packed)[1]

    with pytest.raises(CaptureError, match="packs sequences by their lengths"):
        turbotx.optimize(function, backend="aten")(torch.ones(2, 5, 3), torch.tensor([5, 2]))
