"""Packed sequences in Triton: attention by bounds, and what is made of each sequence's tokens.

In: kernels, sequences of any lengths with tokens of none behind them. Out: what `ir.packed_ops`
gives, by Triton's interpreter; every target's compiler, without spills.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.kernels.triton.attention_runner import launch
from turbotx.ir import packed_ops
from turbotx.ir.matmul_kernels import AttentionKernel, SequenceKernel
from turbotx.kernels.attention_jobs import attention_job
from turbotx.kernels.triton.attention import (
    AttentionSchedule,
    attention_grid,
    choose_attention_schedule,
    print_triton_attention,
)
from turbotx.kernels.triton.compiler import TARGETS, build
from turbotx.kernels.triton.sequences import (
    SequenceSchedule,
    choose_sequence_schedule,
    print_triton_sequence,
    sequence_grid,
    sequence_job,
)

MIXTURES = {
    "mixed": ([5, 0, 40, 1, 17], 3), "one": ([33], 0), "short": ([1], 15), "empty": ([0, 0], 16),
    "tiles": ([16, 16, 32], 0), "many": ([1, 0] * 70, 2),
}  # fmt: skip


def bounds_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


GIVEN = ("mask", "causal, window", "bias, starts", "blind")
# More sequences than a program looks at together take the interpreter long.
CASES = [("many", "mask"), *((m, g) for m in MIXTURES if m != "many" for g in GIVEN)]


@pytest.mark.parametrize(("mixture", "given"), CASES)
def test_attention_sees_its_own_sequence(mixture: str, given: str) -> None:
    lengths, beyond = MIXTURES[mixture]
    tokens, bounds = sum(lengths) + beyond, bounds_of(lengths)
    said: dict[str, Any] = {"scale": 0.25}
    if given == "causal, window":
        said |= {"causal": True, "window": (5, -1)}
    if given == "blind":
        said |= {"blind_mean": True}
    starts = torch.arange(len(lengths)) % 3 * (given == "bias, starts")
    bias = torch.randn(1, 2, 44, 44) if given == "bias, starts" else None
    packed = torch.randn(1, tokens, 4, 16)
    q, k, v = (p.transpose(1, 2) for p in packed.split([2, 1, 1], 2))
    keys = torch.rand(1, 1, 1, tokens) > (0.9 if given == "blind" else 0.2)
    kernel = AttentionKernel(
        torch.float32, 16, 0.25, said.get("causal", False), "none" if bias is None else "float32",
        "mask", said.get("window", (-1, -1)), blind_mean=given == "blind", packed=True,
    )  # fmt: skip
    out = run_packed(kernel, q, k, v, keys, bias, bounds, starts)
    exact = packed_ops.packed_attention(
        q.double(), k.double(), v.double(), keys, None if bias is None else bias.double(), None,
        bounds, starts, **said,
    )  # fmt: skip
    there = sum(lengths)
    torch.testing.assert_close(out[:, :there].double(), exact[:, :there], rtol=1e-5, atol=1e-5)
    assert out[:, there:].isnan().all(), "tokens of no sequence were written"


def run_packed(
    kernel: AttentionKernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor,
    bias: torch.Tensor | None, bounds: torch.Tensor, starts: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    _, heads, tokens, width = q.shape
    out = torch.full((1, tokens, heads, width), torch.nan)
    sizes = [len(starts), heads, k.shape[1], tokens, tokens]
    sizes += [s for t in (q, k, v) for s in t.stride()[:3]]
    sizes += [out.stride(0), out.stride(2), out.stride(1), tokens]
    sizes += [0] * 4 if bias is None else bias.stride()
    given = [t for t in (q, k, v, out, keys, bias, bounds, starts) if t is not None]
    cut = AttentionSchedule(16, 16)
    launch(
        print_triton_attention(kernel, cut), kernel.name,
        attention_grid(cut, len(starts), heads, tokens, packed=True), (*given, *sizes),
        {"Q_TILE": 16, "K_TILE": 16},
    )  # fmt: skip
    return out


KINDS = [
    ("sum", torch.float16), ("sum", torch.bool), ("max", torch.float32), ("max", torch.int32),
    ("first", torch.float16), ("last", torch.float32), ("cumsum", torch.int32),
    ("cumsum", torch.bool),
]  # fmt: skip


@pytest.mark.parametrize(("which", "dtype"), KINDS, ids=str)
def test_one_thing_of_each_sequence(which: str, dtype: torch.dtype) -> None:
    for lengths, beyond in ([5, 0, 9, 1], 3), ([0], 16), ([11], 0):
        for lead, after in ((), (5,)), ((3,), (2,)), ((), ()):
            x = torch.randn(1, *lead, sum(lengths) + beyond, *after) * 9
            check_sequence(which, x.to(dtype) if dtype is not torch.bool else x > 0, lengths, lead)


def check_sequence(which: str, x: torch.Tensor, lengths: list[int], lead: tuple[int, ...]) -> None:
    bounds, dim = bounds_of(lengths), 1 + len(lead)
    if which in ("first", "last"):
        meant = packed_ops.sequence_token(x, bounds, dim, which == "last")
    else:
        meant = getattr(packed_ops, f"sequence_{which}")(x, bounds, dim)
    kernel = SequenceKernel(which, x.dtype, meant.dtype)
    before, after = lead[0] if lead else 1, x[0].numel() // (x.shape[dim] * (lead or (1,))[0])
    for cut in (choose_sequence_schedule(after), SequenceSchedule(4, 2)):
        out = torch.full_like(meant, 7)
        grid = sequence_grid(kernel, cut, len(lengths), before, after)
        sizes = (before, x.shape[dim], after)
        tiles = {"ROWS": cut.rows, "COLS": cut.cols}
        launch(print_triton_sequence(kernel), kernel.name, grid, (x, bounds, out, *sizes), tiles)
        near = 2e-2 if x.dtype is torch.float16 else 1e-4
        torch.testing.assert_close(out, meant, rtol=2e-3, atol=near)


def test_nan_and_infinity_stay() -> None:
    x = torch.tensor([[1.0, torch.nan, 2.0, -torch.inf, -torch.inf, 3.0]])
    for which in ("sum", "max"):
        check_nan(which, x)


def check_nan(which: str, x: torch.Tensor) -> None:
    bounds, out = torch.tensor([0, 3, 5, 5, 6]), torch.zeros(4)
    kernel, cut = SequenceKernel(which, x.dtype, x.dtype), choose_sequence_schedule(1)
    launch(
        print_triton_sequence(kernel), kernel.name, sequence_grid(kernel, cut, 4, 1, 1),
        (x, bounds, out, 1, 6, 1), {"ROWS": cut.rows, "COLS": cut.cols},
    )  # fmt: skip
    meant = getattr(packed_ops, f"sequence_{which}")(x, bounds, 1)
    torch.testing.assert_close(out, meant, equal_nan=True)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_compiles_without_spills(target: str) -> None:
    jobs = [
        sequence_job(SequenceKernel(which, dtype, out), target, choose_sequence_schedule(after))
        for which, dtype, out in (
            ("sum", torch.float16, torch.float16), ("max", torch.float32, torch.float32),
            ("last", torch.bfloat16, torch.bfloat16), ("cumsum", torch.int64, torch.int64),
        )
        for after in (1, 384)
    ]  # fmt: skip
    for width, bias in ((32, "none"), (64, "storage"), (128, "float32")):
        kernel = AttentionKernel(
            torch.float16, width, 0.125, False, bias, "mask", blind_mean=True, packed=True
        )
        cuts = dict.fromkeys(choose_attention_schedule(kernel, n) for n in (16, 4096))
        jobs += [attention_job(kernel, target, cut) for cut in cuts]
    for built in build(jobs, workers=1):
        assert built.resources.spills == 0, f"{built.job.name} for {target}"
