"""Ops that read raw memory get it as eager's: rows made dense, whole memory behind a view."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import turbotx
from turbotx.engine.optimize import engine_of
from turbotx.errors import CaptureError, IndexOutOfRangeError, InputError

A, B = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 6).requires_grad_(False)


@torch.library.custom_op("raw_reads::first_row", mutates_args=())
def first_row(t: torch.Tensor) -> torch.Tensor:
    """The first elements in memory, however they are looked at."""
    if not t.is_contiguous() and t.dim() == 2:
        raise ValueError("dense rows, please")
    return t.as_strided((t.shape[-1],), (1,)).clone()


@first_row.register_fake
def _(t: torch.Tensor) -> torch.Tensor:
    return t.new_empty(t.shape[-1])


def same(function, *calls, backend="auto") -> None:
    fast = turbotx.optimize(function, backend=backend)
    with torch.no_grad():
        for x in calls:
            torch.testing.assert_close(fast(x), function(x))


X = torch.randn(4, 6)


@pytest.mark.parametrize("backend", ["auto", "aten"])
def test_dense_rows_are_kept_before_ops_of_ones_own(backend: str) -> None:
    same(lambda t: first_row(t.t().contiguous()) * 2, X, torch.randn(3, 6), backend=backend)
    same(lambda t: first_row(t.unsqueeze(0).transpose(1, 2)) * 2, X, backend=backend)
    same(lambda t: first_row(A(t)) + first_row(B(t)), X, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "aten"])
def test_recurrent_layers_of_several_steps(backend: str) -> None:
    for layer in (nn.LSTM(6, 5), nn.GRU(6, 5, batch_first=True), nn.LSTM(6, 5, bidirectional=True)):
        fast = turbotx.optimize(layer.eval(), backend=backend)
        for x in (torch.randn(3, 4, 6), torch.randn(2, 5, 6)):
            with torch.no_grad():
                for mine, own in zip(fast(x)[:1], layer(x)[:1], strict=True):
                    torch.testing.assert_close(mine, own)


def test_complex_numbers_of_pairs() -> None:
    def turn(t: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(t.view(2, -1, t.shape[1]).permute(2, 1, 0).contiguous())
        return torch.view_as_real(pairs * 1j)

    same(turn, X, torch.randn(8, 3))


STRIDED = {
    "a packed product": lambda t: A(t).as_strided((2, 6), (12, 1)) + B(t)[:2],
    "a view": lambda t: (t * 2)[1:, 2:].as_strided((2, 3), (6, 2)),
    "the memory past a view": lambda t: (t * 2)[:1].as_strided((t.numel(),), (1,)) + 1,
    "an offset": lambda t: (t * 2)[1:].as_strided((3,), (1,), 2),
    "its own strides": lambda t: torch.as_strided(t, t.shape, t.stride()),
    "an input": lambda t: t.as_strided((t.shape[0],), (1,)) * 2,
    "a copy": lambda t: torch.as_strided(t.mT.contiguous(), (6,), (2,)) + 0.5,
    "a parameter": lambda t: A.weight.t().as_strided((4, 6), (6, 1)) + t,
}


@pytest.mark.parametrize("name", STRIDED)
def test_as_strided(name: str) -> None:
    same(STRIDED[name], X, torch.randn(6, 4).t())


def test_as_strided_of_slices_is_refused() -> None:
    fast = turbotx.optimize(STRIDED["an input"])
    fast(X)
    with pytest.raises(InputError, match=r"reads the memory of 't' .*as_strided"):
        fast(torch.randn(4, 9)[:, :6])
    with pytest.raises(InputError, match=r"t\.clone\(\)"):
        fast(torch.randn(5, 6)[1:])


def test_as_strided_past_the_memory_is_refused() -> None:
    fast = turbotx.optimize(lambda t: (t * 2).as_strided((3, 6), (6, 1)))
    fast(X)
    with pytest.raises(IndexOutOfRangeError, match="within the memory of mul"):
        fast(torch.randn(2, 6))


def test_ops_that_take_any_layout_get_no_copy() -> None:
    fast = turbotx.optimize(lambda t: (A(t).sort(-1)[0], B(t).topk(2)[0]))
    fast(X)
    (compiled,) = engine_of(fast).variants()
    assert [x.name for x in compiled.assembly.launches if "laid_out" in x.name] == []


LAYOUT_QUESTIONS = {
    "is_contiguous": lambda t: t * 2 if t.is_contiguous() else t + 1,
    "stride": lambda t: t * 2 if t.stride()[0] == t.shape[1] else t + 1,
    "storage_offset": lambda t: t * 2 if t.storage_offset() == 0 else t + 1,
    "of a view": lambda t: t * 2 if t[None].mT.mT.is_contiguous() else t + 1,
}


@pytest.mark.parametrize("name", LAYOUT_QUESTIONS)
def test_an_input_whose_layout_is_asked_for_is_dense(name: str) -> None:
    asks = LAYOUT_QUESTIONS[name]
    fast = turbotx.optimize(asks, backend="aten")
    for t in (torch.randn(4, 6), torch.randn(1, 6), torch.randn(5, 3)):
        torch.testing.assert_close(fast(t), asks(t))
    with pytest.raises(InputError, match=r"asks how it lies .* pass t\.clone\(\)"):
        fast(torch.randn(8, 12)[2::2, ::2])


def test_the_memory_behind_an_input_is_nothing_to_decide_by() -> None:
    for asks in (lambda t: t * t.untyped_storage().nbytes(), lambda t: t * t[1:].storage().size()):
        with pytest.raises(CaptureError, match="storage of an input"):
            turbotx.optimize(asks)(torch.randn(4, 6)[:2])


def test_where_nobody_asks_for_an_inputs_layout_any_will_do() -> None:
    def asks_another(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        made = t @ u
        return made * 2 if made.is_contiguous() and u.stride(0) == 6 else made + 1

    fast = turbotx.optimize(asks_another, backend="aten")
    for t in (torch.randn(4, 6), torch.randn(8, 12)[::2, ::2]):
        u = torch.randn(6, 6)
        torch.testing.assert_close(fast(t, u), asks_another(t, u))


@pytest.mark.parametrize(
    "shows",
    [
        lambda t: t.reshape(12, -1),
        lambda t: t.flatten(1)[:, 1:],
        lambda t: t.contiguous(),
        lambda t: t.ravel(),
        lambda t: t.mT.contiguous().mT,
        lambda t: t[:, :, ::2].reshape(12, -1),
    ],
)
def test_an_input_that_is_returned_in_another_shape_is_a_view_where_eagers_is(shows: Any) -> None:
    fast, whole = turbotx.optimize(shows, backend="aten"), torch.randn(1, 2, 24)
    for t in (
        torch.randn(1, 2, 12), whole[:, :, :12], whole[:, :, ::2], torch.randn(1, 12, 2).mT,
        torch.randn(1, 1, 1).expand(1, 2, 12),
    ):  # fmt: skip
        ours, right = fast(t), shows(t)
        assert torch.equal(ours, right) and ours.stride() == right.stride()
        shared = [x.untyped_storage().data_ptr() == t.untyped_storage().data_ptr()
                  for x in (ours, right)]  # fmt: skip
        assert shared[0] == shared[1]
