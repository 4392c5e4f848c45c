"""Dtypes that kernels do not store: PyTorch's ops compute them, in the same program.

In: functions of unsigned, float8 and complex numbers. Out: eager mode's results, dtypes included.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import turbotx

DTYPES = (
    torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e8m0fnu, torch.complex64, torch.complex32,
)  # fmt: skip


def uses(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    real = x.real if x.is_complex() else x
    numbers = real.float() * 2 + 1
    return numbers.softmax(-1), torch.cat([x, x], 1), x[1:].t().clone(), numbers.abs().to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_kernels_do_not_store_runs(dtype: torch.dtype) -> None:
    fast = turbotx.optimize(uses)
    for given in (torch.randint(1, 4, (3, 4)), torch.randint(1, 4, (5, 2)).t()):
        x = given.to(dtype)
        ours, theirs = fast(x), uses(x)
        assert [t.dtype for t in ours] == [t.dtype for t in theirs]
        torch.testing.assert_close([*map(plain, ours)], [*map(plain, theirs)])
    report = turbotx.explain(uses, torch.ones(3, 4).to(dtype))
    name = "complex" if dtype.is_complex else str(dtype).removeprefix("torch.")
    assert f"works on {name} numbers, which kernels do not" in str(report.to_dict())


def plain(tensor: torch.Tensor) -> Any:
    return tensor if tensor.dtype is torch.float32 else tensor.to(torch.complex64)
