"""Triton GEMMs of floats by int8 and int4 weights: the same numbers in float64; compiled.

In: rows of floats, weights with a scale a column or a group of inputs. Out: differences from the
exact product, bounded by what PyTorch's ops give; spills of what is compiled.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.kernels.triton.gemm_jobs import job_of
from tests.kernels.triton.test_gemm import check_built, run
from turbotx.ir.quantized_ops import SCHEMES, Scheme, weight_only_linear
from turbotx.kernels.device_classes import DEVICES
from turbotx.kernels.gemm_heuristics import BUCKETS
from turbotx.kernels.schedule_selector import Tiles, structure_of
from turbotx.kernels.triton.gemm_template import GemmSchedule, GemmTemplate

HOWS = {
    "int8-weights": SCHEMES["int8-weights"],
    "int4-weights": SCHEMES["int4-weights"],
    "int4 with offsets": Scheme(float_rows=True, group=32, shifted=True),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def template_of(how: str, dtype: torch.dtype, n: int, k: int, **more: Any) -> GemmTemplate:
    group, shifted = HOWS[how].group, HOWS[how].shifted
    narrow = torch.uint8 if group else torch.int8
    given = {"narrow": narrow, "float_rows": True, "group": group, "shifted": shifted}
    return GemmTemplate(dtype, n, k, **given, **more)


def operands(
    how: str, t: GemmTemplate, tokens: int, weight: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    width = t.n * (1 + t.gated)
    weight = torch.randn(width, t.k) if weight is None else weight
    scale = HOWS[how].scale_of(weight)
    given = {"w": HOWS[how].integers_of(weight, scale), "scales": scale}
    given["x"] = torch.randn(tokens, t.k).to(t.dtype)
    if t.bias:
        given["bias"] = torch.randn(width).to(t.dtype)
    return given


def meaning(t: GemmTemplate, given: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    bias = given["bias"].to(dtype) if t.bias else None
    scale = given["scales"] if t.group else given["scales"][:, 0]
    scale = scale.double() if dtype is torch.float64 else scale
    out = weight_only_linear(given["x"].to(dtype), given["w"], bias, scale)
    if not t.gated:
        return out
    value, gate = out.chunk(2, 1)
    return value * gate


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "n", "k", "k_tile", "splits", "late"),
    [(1, 16, 64, 32, 1, 1), (5, 40, 72, 64, 1, 0), (17, 24, 300, 32, 2, 1)],
)
def test_sums_of_any_size(
    how: str, dtype: torch.dtype, tokens: int, n: int, k: int, k_tile: int, splits: int, late: int
) -> None:
    for gated in (False, True):
        t = template_of(how, dtype, n, k, bias=True, gated=gated)
        given = operands(how, t, tokens)
        exact, own = (meaning(t, given, d).double() for d in (torch.float64, dtype))
        schedule = GemmSchedule(16, 16, k_tile, splits=splits, late=late)
        made = run(t, schedule, **given)["out"].double()
        unit = torch.finfo(dtype).eps * exact.abs().max()
        assert (made - exact).abs().max() <= 1.5 * (own - exact).abs().max() + 2 * unit


@pytest.mark.parametrize("how", HOWS)
def test_a_weight_without_a_scale_is_nan_in_its_own_column_alone(how: str) -> None:
    t = template_of(how, torch.float16, 20, 72)
    weight = torch.randn(20, 72)
    weight[3, 70] = torch.inf
    out = run(t, GemmSchedule(16, 16, 32), **operands(how, t, 2, weight))["out"]
    assert out[:, 3].isnan().all() and out.isnan().sum() == 2


def test_each_kind_is_tuned_apart_and_takes_whole_groups() -> None:
    plain = GemmTemplate(torch.float16, 768, 768)
    kinds = [template_of(how, torch.float16, 768, 768) for how in HOWS]
    assert len({structure_of(t) for t in (plain, *kinds)}) == 4
    for t in kinds:
        chosen = Tiles((("gemm_*", "k16"),), "sm_90", {}).gemm(t, 16)
        assert chosen is not None and chosen.k_tile == 32


TEMPLATES = [
    (torch.float16, 2304, 768, {"bias": True}),
    (torch.bfloat16, 768, 3072, {"bias": True, "residual": True}),
    (torch.bfloat16, 8192, 2048, {"gated": True, "activation": "silu"}),
    (torch.float32, 768, 3072, {"bias": True, "residual": True}),
]


def jobs_of(how: str, made: Any, tokens: int, target: str) -> Any:
    dtype, n, k, more = made
    t = template_of(how, dtype, n, k, **more)
    return job_of(t, tokens, target, Tiles((), target, {}).gemm(t, tokens))


@pytest.mark.parametrize("how", HOWS)
def test_builds_without_spills(how: str) -> None:
    """Every template for few rows, over the targets, and what holds most at 64 rows; the next test
    has all buckets."""
    few = [jobs_of(how, made, 16, target) for made, target in zip(TEMPLATES, DEVICES, strict=True)]
    check_built([*few, jobs_of(how, TEMPLATES[2], 64, "sm_80")])


@pytest.mark.sweep
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("made", TEMPLATES, ids=str)
def test_every_bucket_builds_for_every_target(how: str, made: Any) -> None:
    check_built(jobs_of(how, made, *where) for where in itertools.product(BUCKETS, DEVICES))
