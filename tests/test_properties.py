"""Random graphs of elementwise ops, reductions, views and indexing, through the whole pipeline.

In: 5 to 40 random calls over random shapes and dtypes. Out: what the kernels mean is what eager
means in float64, and the printed C++ is as near to it as eager is; for example::

    x -> softmax(1) -> permute -> + y -> reshape -> layer_norm -> cat -> sum(0)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import turbotx
from tests.compiled_functions import by_interpreter, compile_function
from tests.kernels.cpp_probe import needs_compiler

SWEEP = pytest.mark.skipif(
    "TURBOTX_SWEEP" not in os.environ, reason="takes many minutes: set TURBOTX_SWEEP=1 to run it"
)

UNARY: list[Callable[[Any], Any]] = [
    torch.tanh, torch.sigmoid, torch.neg, torch.abs, torch.nn.functional.gelu, torch.relu,
    lambda x: x * 0.5 + 1, lambda x: x.clamp(-1, 1), lambda x: torch.where(x > 0, x, x * 0.1),
    torch.nn.functional.silu, lambda x: torch.exp(-x.abs()), lambda x: x.masked_fill(x > 1, 1.0),
    lambda x: (x.abs() + 1).rsqrt(), torch.sin,
    lambda x: x.to(torch.int32).to(x.dtype),  # jumps: last
]  # fmt: skip
BINARY: list[Callable[[Any, Any], Any]] = [
    torch.add, torch.sub, torch.mul, torch.maximum, lambda x, y: x / (y.abs() + 1),
    lambda x, y: torch.where(x > y, x, y),
    lambda x, y: (x >= y).to(x.dtype),  # jumps: last
]  # fmt: skip
NORMAL: list[Callable[[Any], Any]] = [
    lambda x: x.softmax(-1), lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:]),
    lambda x: x - x.mean(-1, keepdim=True), lambda x: x.log_softmax(-1) * 0.1,
]  # fmt: skip
REDUCE: list[Callable[[Any, int, bool], Any]] = [
    lambda x, d, keep: x.mean(d, keep), lambda x, d, keep: x.amax(d, keep),
    lambda x, d, keep: x.sum(d, keepdim=keep) * 0.1, lambda x, d, keep: x.amin(d, keep),
    lambda x, d, keep: x.var(d, correction=0, keepdim=keep),
]  # fmt: skip
Step = tuple[str, int, int, int, int]
Call = Callable[[list[torch.Tensor]], torch.Tensor]
KINDS = [
    *("unary", "unary", "binary", "binary", "normal", "reduce", "permute", "merge", "split"),
    *("slice", "cat", "unsqueeze", "select", "flip", "expand"),
]
steps = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        *[st.integers(0, 1000)] * 4,
    ),
    min_size=5,
    max_size=40,
)  # fmt: skip


def choose(step: Step, made: list[torch.Tensor], jumps: bool) -> Call | None:
    """Return the step as a function of all that was made before; None where it does not fit.

    Everything is decided on real tensors, so that tracing with symbolic sizes decides nothing.
    Ops that jump at a value are chosen only with `jumps`: there a rounding error decides.
    """
    unary, binary = (UNARY, BINARY) if jumps else (UNARY[:-1], BINARY[:-1])
    kind, a, b, c, which = step
    i = len(made) - 1 - a % min(len(made), 3)
    x = made[i]
    rank, d = x.dim(), c % max(x.dim(), 1)
    if kind == "unary":
        return lambda m: unary[which % len(unary)](m[i])
    if kind == "binary":
        fitting = [j for j, y in enumerate(made) if broadcasts(x, y)]
        j = fitting[b % len(fitting)]
        return lambda m: binary[which % len(binary)](m[i], m[j])
    if kind == "unsqueeze" and rank < 4:
        return lambda m: m[i].unsqueeze(b % (rank + 1))
    if rank == 0:
        return None
    if kind == "normal":
        return lambda m: NORMAL[which % len(NORMAL)](m[i])
    if kind == "reduce":
        return lambda m: REDUCE[which % len(REDUCE)](m[i], d, bool(b % 2))
    if kind == "permute":
        return lambda m: m[i].transpose(b % rank, d)
    if kind == "merge" and rank >= 2:
        return lambda m: m[i].flatten(b % (rank - 1), b % (rank - 1) + 1)
    if kind == "flip":
        return lambda m: m[i].flip(d)
    return take_apart(kind, i, x, d, b)


def take_apart(kind: str, i: int, x: torch.Tensor, d: int, b: int) -> Call | None:
    even = [k for k, n in enumerate(x.shape) if n % 2 == 0]
    k = even[b % len(even)] if even else 0
    if kind == "split" and even and x.dim() < 4:
        return lambda m: m[i].unflatten(k, (2, m[i].shape[k] // 2))
    if kind == "slice" and even:
        return lambda m: m[i].narrow(k, b % 2, m[i].shape[k] // 2)
    if kind == "cat":
        return lambda m: torch.cat([m[i], m[i] * 2 if b % 2 else -m[i]], dim=d)
    if kind == "select":
        return lambda m: m[i].select(d, 0)
    if kind == "expand" and x.dim() < 4:
        return lambda m: m[i].unsqueeze(0).expand(2, *m[i].shape)
    return None


def broadcasts(x: torch.Tensor, y: torch.Tensor) -> bool:
    pairs = zip(reversed(x.shape), reversed(y.shape), strict=False)
    return y.dim() <= x.dim() and all(n in (m, 1) for m, n in pairs)


def program(
    drawn: list[Step], outputs: int, inputs: list[torch.Tensor], jumps: bool = True
) -> Callable[..., list[torch.Tensor]]:
    """Return the drawn calls as one function of the inputs, each `noise` relative error off."""
    calls: list[Call] = []
    made = list(inputs)
    for step in drawn:
        call = choose(step, made, jumps)
        result = None if call is None else call(made)
        if call is not None and result is not None and result.dim() <= 4 and result.numel() < 5000:
            calls.append(call)
            made.append(result)

    def run(*given: torch.Tensor, noise: float = 0.0) -> list[torch.Tensor]:
        values = list(given)
        for call in calls:
            value = call(values)
            if noise:
                value = value * (1 + noise * (2 * torch.rand_like(value) - 1))
            values.append(value)
        return values[-outputs:]

    return run


def same(ours: torch.Tensor, true: torch.Tensor) -> None:
    assert ours.shape == true.shape
    torch.testing.assert_close(ours.double(), true.double(), rtol=1e-9, atol=1e-9)


@st.composite
def inputs(draw: st.DrawFn) -> list[torch.Tensor]:
    shape = draw(st.lists(st.sampled_from([2, 3, 4, 6]), min_size=1, max_size=3))
    torch.manual_seed(draw(st.integers(0, 99)))
    return [torch.randn(shape), torch.randn(shape), torch.randn(shape[-1:])]


def check_meaning(drawn: list[Step], given_inputs: list[torch.Tensor], outputs: int) -> None:
    function = program(drawn, outputs, given_inputs)
    made = compile_function(function, *given_inputs)
    wide = [x.double() for x in given_inputs]
    for ours, true in zip(made.run(wide, by_interpreter), function(*wide), strict=True):
        same(ours, true)


# A capture takes a second: a failing example is shown as it was drawn, not made smaller.
patient: dict[str, Any] = {
    "phases": (Phase.explicit, Phase.generate),
    "suppress_health_check": list(HealthCheck),
}


@settings(max_examples=12, **patient)
@given(steps, inputs(), st.integers(1, 3))
def test_kernels_mean_what_the_graph_means(
    drawn: list[Step], given_inputs: list[torch.Tensor], outputs: int
) -> None:
    check_meaning(drawn, given_inputs, outputs)


@pytest.mark.slow
@SWEEP
@settings(max_examples=200, **patient)
@given(steps, inputs(), st.integers(1, 3))
def test_many_kernels_mean_what_the_graph_means(
    drawn: list[Step], given_inputs: list[torch.Tensor], outputs: int
) -> None:
    check_meaning(drawn, given_inputs, outputs)


def check_compiled(drawn: list[Step], shapes: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Errors at most a few times those of eager, or of float64 that rounds as `dtype` does: a norm
    of equal numbers, say, magnifies a rounding error that eager happens not to make."""
    function = program(drawn, 2, shapes, jumps=False)
    x = [t.to(dtype) for t in shapes]
    wide = [t.double() for t in x]
    eager, true = function(*x), function(*wide)
    eps = torch.finfo(dtype).eps
    rounded = [function(*wide, noise=eps) for _ in range(8)]
    for k, ours in enumerate(turbotx.optimize(function)(*x)):
        allowed = 8 * eps * (1 + true[k].abs().max())
        for other in (eager, *rounded):
            allowed = max(allowed, 4 * (other[k].double() - true[k]).abs().max())
        assert float((ours.double() - true[k]).abs().max()) <= allowed


@needs_compiler
@settings(max_examples=4, **patient)
@given(steps, inputs(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_compiled_programs(
    drawn: list[Step], shapes: list[torch.Tensor], dtype: torch.dtype
) -> None:
    check_compiled(drawn, shapes, dtype)


@pytest.mark.slow
@SWEEP
@needs_compiler
@settings(max_examples=60, **patient)
@given(steps, inputs(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_many_compiled_programs(
    drawn: list[Step], shapes: list[torch.Tensor], dtype: torch.dtype
) -> None:
    check_compiled(drawn, shapes, dtype)
