"""Questions about an input's layout are answered as in eager mode, also at sizes of 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import turbotx
from turbotx.errors import CaptureError, InputError, TurbotxError

QUESTIONS = {
    "contiguous": lambda x: x.is_contiguous(),
    "contiguous, turned": lambda x: x.transpose(0, 1).is_contiguous(),
    "of one element": lambda x: x[:, 0].is_contiguous(),
    "stride": lambda x: x.transpose(0, 1).stride(0) == 8,
    "contiguous, computed": lambda x: (x.transpose(0, 1) * 2).is_contiguous(),
    "stride, computed": lambda x: (x.transpose(0, 1) + 1).stride(2) == 1,
    "contiguous, a part": lambda x: (x * 2)[:, 1:].is_contiguous(),
    "contiguous, a part turned": lambda x: (x * 2)[:, 1:].transpose(0, 1).is_contiguous(),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_answer_is_the_calls_own(name: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if QUESTIONS[name](x) else x + 1

    fast = turbotx.optimize(function, backend="aten")
    for shape in ((2, 5, 8), (2, 1, 8), (1, 5, 8), (1, 1, 8), (3, 4, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(fast(x), function(x), rtol=0, atol=0)


def followed_or_refused(fast: Any, function: Any, x: torch.Tensor) -> str:
    """Return what a call was refused with; "" where it gives what eager mode gives."""
    try:
        came = fast(x)
    except TurbotxError as error:
        return str(error)
    torch.testing.assert_close(came, function(x), rtol=0, atol=0)
    return ""


HISTORIES: dict[str, Callable[[], torch.Tensor]] = {
    "a row of a sequence": lambda: torch.randn(1, 5, 8)[:, :1],
    "a sequence of a batch": lambda: torch.randn(4, 5, 8)[:1],
    "turned": lambda: torch.randn(1, 5, 8).transpose(0, 1),
    "expanded": lambda: torch.randn(5, 8).expand(1, 5, 8),
    "a channel": lambda: torch.randn(2, 1, 4).to(memory_format=torch.contiguous_format)[:, :, None],
}


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("d", [0, 1])
def test_a_stride_that_tells_a_history_is_followed_or_refused(history: str, d: int) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x * x.stride(d)

    x = HISTORIES[history]()
    fast = turbotx.optimize(function, backend="aten")
    for given in (x, x.clone(memory_format=torch.contiguous_format), x):
        refusal = followed_or_refused(fast, function, given)
        assert not refusal or ("strides" in refusal and given is x)


def test_a_stride_of_a_dim_of_size_1_is_refused_by_name() -> None:
    fast = turbotx.optimize(lambda x: x * x.stride(0), backend="aten")
    with pytest.raises(InputError, match=r"asks for the strides of 'x'.* has the strides"):
        fast(torch.randn(1, 5, 8)[:, :1])


@pytest.mark.parametrize(
    "asks",
    [
        lambda y: y.stride(0),
        lambda y: y.stride()[0],
        lambda y: y.stride(dim=-3),
        lambda y: y.dim_order()[0] + 2,
    ],
)
def test_one_of_a_computed_tensor_is_refused_by_name(asks: Callable[..., int]) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x * asks(x.transpose(0, 1) + 1)

    fast = turbotx.optimize(function, backend="aten")
    for shape in ((2, 5, 8), (3, 4, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(fast(x), function(x), rtol=0, atol=0)
    for shape in ((2, 1, 8), (1, 5, 8), (1, 1, 8)):
        x = torch.randn(shape)
        refusal = followed_or_refused(fast, function, x)
        assert not refusal or "stride of a dim of size 1" in refusal
    with pytest.raises(CaptureError, match="stride of a dim of size 1 of a tensor that it has"):
        fast(torch.randn(2, 1, 8))


def test_where_only_contiguity_is_asked_such_strides_are_taken() -> None:
    fast = turbotx.optimize(lambda x: x * 2 if x.is_contiguous() else x, backend="aten")
    x = torch.randn(1, 5, 8)[:, :1]
    torch.testing.assert_close(fast(x), x * 2)


@pytest.mark.parametrize(
    "asks", [torch.is_conj, torch.Tensor.is_conj, torch.is_neg, lambda x: x.is_neg()]
)
def test_bits_that_a_trace_resolves_are_refused_by_name(asks: Callable[[Any], bool]) -> None:
    fast = turbotx.optimize(lambda x: x * 2 if asks(x) else x + 1, backend="aten")
    z = torch.randn(3, dtype=torch.complex64)
    for x in (z, z.conj(), z.conj().imag):
        with pytest.raises(CaptureError, match=r"asks for is_(conj|neg)\(\) of a tensor"):
            fast(x)
