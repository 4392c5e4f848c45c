"""The scalar functions that kernels consist of, one row each: name, C++, Triton and meaning.

In: names used by `ir.Compute`, `ir.Reduce` and `ir.Scan`. Out: how each target spells them, and
their definition on float64 tensors (the tests' reference), for example::

    PRIMITIVES["rsqrt"]  ->  cpp "ttx::rsqrt({0})", triton "tl.rsqrt({0})", torch.rsqrt
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Primitive:
    """One pointwise function. `cost`: in units of one add, to weigh recomputation against a
    load."""

    name: str
    cpp: str
    triton: str
    meaning: Callable[..., Any]
    cost: int = 1


@dataclass(frozen=True)
class Reduction:
    """A reduction over the row axes: names of the results in order, and definition."""

    name: str
    outputs: tuple[str, ...]
    meaning: Callable[..., Any]


def _rows(*table: tuple[Any, ...]) -> dict[str, Primitive]:
    return {row[0]: Primitive(*row) for row in table}


def _truncdiv(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.div(a, b, rounding_mode="trunc")


PRIMITIVES: dict[str, Primitive] = _rows(
    # name, C++, Triton, float64 meaning, cost
    ("add", "{0} + {1}", "{0} + {1}", torch.add),
    ("sub", "{0} - {1}", "{0} - {1}", torch.sub),
    ("mul", "{0} * {1}", "{0} * {1}", torch.mul),
    ("fma", "ttx::fma({0}, {1}, {2})", "tl.fma({0}, {1}, {2})", lambda a, b, c: a * b + c),
    ("div", "{0} / {1}", "{0} / {1}", torch.true_divide, 4),
    ("div_rn", "{0} / {1}", "tl.div_rn({0}, {1})", torch.true_divide, 4),  # correctly rounded
    ("floordiv", "ttx::floordiv({0}, {1})", "floordiv({0}, {1})", torch.floor_divide, 8),
    ("truncdiv", "ttx::truncdiv({0}, {1})", "truncdiv({0}, {1})", _truncdiv, 8),
    ("remainder", "ttx::remainder({0}, {1})", "remainder({0}, {1})", torch.remainder, 8),
    ("fmod", "ttx::fmod({0}, {1})", "fmod({0}, {1})", torch.fmod, 8),
    ("neg", "-{0}", "-{0}", torch.neg),
    ("abs", "ttx::abs({0})", "tl.abs({0})", torch.abs),
    ("sign", "ttx::sign({0})", "sign({0})", torch.sign),
    ("maximum", "ttx::maximum({0}, {1})", "maximum({0}, {1})", torch.maximum),
    ("minimum", "ttx::minimum({0}, {1})", "minimum({0}, {1})", torch.minimum),
    ("exp", "ttx::exp({0})", "tl.exp({0})", torch.exp, 12),
    ("exp2", "ttx::exp2({0})", "tl.exp2({0})", torch.exp2, 12),
    ("expm1", "ttx::expm1({0})", "expm1({0})", torch.expm1, 16),
    ("log", "ttx::log({0})", "tl.log({0})", torch.log, 12),
    ("log2", "ttx::log2({0})", "tl.log2({0})", torch.log2, 12),
    ("log1p", "ttx::log1p({0})", "log1p({0})", torch.log1p, 16),
    ("sqrt", "ttx::sqrt({0})", "tl.sqrt_rn({0})", torch.sqrt, 6),
    ("rsqrt", "ttx::rsqrt({0})", "tl.rsqrt({0})", torch.rsqrt, 6),
    ("sin", "ttx::sin({0})", "tl.sin({0})", torch.sin, 16),
    ("cos", "ttx::cos({0})", "tl.cos({0})", torch.cos, 16),
    ("tanh", "ttx::tanh({0})", "tanh({0})", torch.tanh, 16),
    ("erf", "ttx::erf({0})", "tl.erf({0})", torch.erf, 16),
    ("sigmoid", "ttx::sigmoid({0})", "tl.sigmoid({0})", torch.sigmoid, 14),
    ("erfc", "ttx::erfc({0})", "libdevice.erfc({0})", torch.erfc, 20),
    ("log10", "ttx::log10({0})", "libdevice.log10({0})", torch.log10, 14),
    ("tan", "ttx::tan({0})", "libdevice.tan({0})", torch.tan, 20),
    ("asin", "ttx::asin({0})", "libdevice.asin({0})", torch.asin, 20),
    ("acos", "ttx::acos({0})", "libdevice.acos({0})", torch.acos, 20),
    ("atan", "ttx::atan({0})", "libdevice.atan({0})", torch.atan, 20),
    ("atan2", "ttx::atan2({0}, {1})", "libdevice.atan2({0}, {1})", torch.atan2, 30),
    ("sinh", "ttx::sinh({0})", "libdevice.sinh({0})", torch.sinh, 20),
    ("cosh", "ttx::cosh({0})", "libdevice.cosh({0})", torch.cosh, 20),
    ("asinh", "ttx::asinh({0})", "libdevice.asinh({0})", torch.asinh, 20),
    ("acosh", "ttx::acosh({0})", "libdevice.acosh({0})", torch.acosh, 20),
    ("atanh", "ttx::atanh({0})", "libdevice.atanh({0})", torch.atanh, 20),
    ("hypot", "ttx::hypot({0}, {1})", "libdevice.hypot({0}, {1})", torch.hypot, 20),
    ("copysign", "ttx::copysign({0}, {1})", "libdevice.copysign({0}, {1})", torch.copysign),
    ("pow", "ttx::pow({0}, {1})", "power({0}, {1})", torch.pow, 30),
    ("floor", "ttx::floor({0})", "tl.floor({0})", torch.floor),
    ("ceil", "ttx::ceil({0})", "tl.ceil({0})", torch.ceil),
    ("trunc", "ttx::trunc({0})", "truncate({0})", torch.trunc),
    ("round", "ttx::round({0})", "round_half_even({0})", torch.round),
    ("isnan", "ttx::isnan({0})", "{0} != {0}", torch.isnan),
    ("isinf", "ttx::isinf({0})", "tl.abs({0}) == float('inf')", torch.isinf),
    ("eq", "{0} == {1}", "{0} == {1}", torch.eq),
    ("ne", "{0} != {1}", "{0} != {1}", torch.ne),
    ("lt", "{0} < {1}", "{0} < {1}", torch.lt),
    ("le", "{0} <= {1}", "{0} <= {1}", torch.le),
    ("gt", "{0} > {1}", "{0} > {1}", torch.gt),
    ("ge", "{0} >= {1}", "{0} >= {1}", torch.ge),
    ("and", "{0} & {1}", "{0} & {1}", torch.bitwise_and),
    ("or", "{0} | {1}", "{0} | {1}", torch.bitwise_or),
    ("xor", "{0} ^ {1}", "{0} ^ {1}", torch.bitwise_xor),
    ("not", "ttx::bitwise_not({0})", "~{0}", torch.bitwise_not),
    ("shl", "ttx::shl({0}, {1})", "{0} << {1}", torch.bitwise_left_shift),
    ("shr", "ttx::shr({0}, {1})", "{0} >> {1}", torch.bitwise_right_shift),
    ("where", "{0} ? {1} : {2}", "tl.where({0}, {1}, {2})", torch.where),
    ("cast", "ttx::cast<{type}>({0})", "{0}.to({type})", lambda x: x),
    # of float32 in [-127.5, 127.5], as int8
    ("round_to_int8", "ttx::cast<int8_t>(ttx::round({0}))", "round_to_int8({0})",
     lambda x: x.round().to(torch.int8)),
    # what is left of a float32 in memory of a half type
    ("bfloat16", "ttx::held<ttx::bf16>({0})", "{0}.to(tl.bfloat16).to(tl.float32)",
     lambda x: x.to(torch.bfloat16).to(x.dtype), 4),
    ("float16", "ttx::held<ttx::f16>({0})", "{0}.to(tl.float16).to(tl.float32)",
     lambda x: x.to(torch.float16).to(x.dtype), 8),
)  # fmt: skip

COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf"})


def _welford(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = x.mean(-1)
    return mean, ((x - mean.unsqueeze(-1)) ** 2).sum(-1)


def _softmax_stats(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = x.amax(-1)
    return largest, (x - largest.unsqueeze(-1)).exp().sum(-1)


REDUCTIONS: dict[str, Reduction] = {
    row.name: row
    for row in (
        Reduction("sum", ("sum",), lambda x: (x.sum(-1),)),
        Reduction("prod", ("prod",), lambda x: (x.prod(-1),)),
        Reduction("max", ("max",), lambda x: (x.amax(-1),)),
        Reduction("min", ("min",), lambda x: (x.amin(-1),)),
        Reduction("any", ("any",), lambda x: (x.any(-1),)),
        Reduction("all", ("all",), lambda x: (x.all(-1),)),
        # mean and sum of squared deviations in one pass (Welford 1962; merged by Chan 1979)
        Reduction("welford", ("mean", "m2"), _welford),
        # largest and sum of exp(x - largest) in one pass (Milakov & Gimelshein 2018)
        Reduction("softmax", ("largest", "total"), _softmax_stats),
    )
}


@dataclass(frozen=True)
class ScanOp:
    """A scan over the row axes; `start` and `cpp` are its initial value and operator in C++."""

    name: str
    start: str
    cpp: str
    triton: str
    meaning: Callable[..., Any]


SCANS: dict[str, ScanOp] = {
    row.name: row
    for row in (
        ScanOp("sum", "0", "+", "tl.cumsum", lambda x: x.cumsum(-1)),
        ScanOp("prod", "1", "*", "tl.cumprod", lambda x: x.cumprod(-1)),
    )
}
