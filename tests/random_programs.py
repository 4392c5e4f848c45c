"""Random programs: calls of tensor ops over random shapes and dtypes, chosen on real tensors.

In: drawn steps (a kind and four numbers each) and inputs. Out: a `Program`, a function of those
inputs whose every call runs in eager PyTorch, for example::

    x -> softmax(-1) -> transpose -> + y -> take(k % 6) -> layer_norm -> cat -> sum(0)
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch.nn import functional as F

Values = list[torch.Tensor]
Call = Callable[[Values], torch.Tensor]
Step = tuple[str, int, int, int, int]
# The limit keeps half precision and small integers in range, so that every result means something.
LARGEST = 1000

UNARY: list[Callable[[Any], Any]] = [
    torch.tanh, torch.sigmoid, torch.neg, torch.abs, F.gelu, torch.relu, F.silu, torch.sin,
    lambda x: x * 0.5 + 1, lambda x: x.clamp(-1, 1), lambda x: torch.where(x > 0, x, x * 0.1),
    lambda x: torch.exp(-x.abs()), lambda x: (x.abs() + 1).rsqrt(), lambda x: x.abs().sqrt(),
    lambda x: (x.abs() + 0.5).log(), lambda x: F.softplus(x), lambda x: x**2 * 0.1,
]  # fmt: skip
WHOLE_UNARY: list[Callable[[Any], Any]] = [
    torch.neg, torch.abs, torch.bitwise_not, torch.square, lambda x: x * 3 - 1,
    lambda x: x.clamp(-2, 5), lambda x: torch.where(x > 2, x, -x), lambda x: x // 3,
    lambda x: x % 5, lambda x: x >> 1, lambda x: x.sign() if x.dtype != torch.uint8 else x,
]  # fmt: skip


def _lerp(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Between two of one dtype, which it asks for; the same whatever dtypes a program runs in."""
    wider = torch.promote_types(x.dtype, y.dtype)
    return torch.lerp(x.to(wider), y.to(wider), 0.25)


BINARY: list[Callable[[Any, Any], Any]] = [
    torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum,
    lambda x, y: x / (y.abs() + 1), lambda x, y: torch.where(x > y, x, y),
    _lerp,
]  # fmt: skip
WHOLE_BINARY: list[Callable[[Any, Any], Any]] = [
    torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum, torch.bitwise_and,
    torch.bitwise_or, torch.bitwise_xor, torch.eq, torch.lt, torch.ge,
    lambda x, y: x // (y.abs() + 1), lambda x, y: x % (y.abs() + 1),
]  # fmt: skip
BOOL_BINARY: list[Callable[[Any, Any], Any]] = [
    torch.logical_and, torch.logical_or, torch.logical_xor, torch.bitwise_and, torch.bitwise_or,
    torch.eq, torch.ne,
]  # fmt: skip
NORMAL: list[Callable[[Any], Any]] = [
    lambda x: x.softmax(-1), lambda x: F.layer_norm(x, x.shape[-1:]),
    lambda x: x - x.mean(-1, keepdim=True), lambda x: x.log_softmax(-1) * 0.1,
    lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-5), lambda x: x.softmax(0),
    lambda x: F.normalize(x, dim=0), lambda x: x - x.logsumexp(-1, keepdim=True),
]  # fmt: skip
REDUCE: list[Callable[[Any, int, bool], Any]] = [
    lambda x, d, keep: x.mean(d, keep), lambda x, d, keep: x.amax(d, keep),
    lambda x, d, keep: x.sum(d, keepdim=keep) * 0.1, lambda x, d, keep: x.amin(d, keep),
    lambda x, d, keep: x.var(d, correction=0, keepdim=keep),
    lambda x, d, keep: (x.var(d, correction=0, keepdim=keep) + 0.1).sqrt(),
    lambda x, d, keep: x.norm(dim=d, keepdim=keep), lambda x, d, keep: (x * 0.5).prod(d, keep),
    lambda x, d, keep: x.mean().expand(x.shape).amax(d, keep),
]  # fmt: skip
WHOLE_REDUCE: list[Callable[[Any, int, bool], Any]] = [
    lambda x, d, keep: x.sum(d, keepdim=keep), lambda x, d, keep: x.amax(d, keep),
    lambda x, d, keep: x.amin(d, keep), lambda x, d, keep: x.argmax(d, keep),
    lambda x, d, keep: x.any(d, keep), lambda x, d, keep: x.max(d, keep)[0],
]  # fmt: skip
BOOL_REDUCE: list[Callable[[Any, int, bool], Any]] = [
    lambda x, d, keep: x.sum(d, keepdim=keep), lambda x, d, keep: x.any(d, keep),
    lambda x, d, keep: x.all(d, keep),
]  # fmt: skip
WHOLES = (torch.int64, torch.int32, torch.uint8)
# What a step may be; the first ones are drawn as often as they stand here.
KINDS = [
    *("unary", "unary", "binary", "binary", "normal", "reduce", "permute", "merge", "split"),
    *("slice", "cat", "unsqueeze", "select", "flip", "expand", "where", "convert", "take"),
    *("pad", "roll", "running", "triangle", "product", "positions", "repeat", "compare"),
]
steps = st.lists(
    st.tuples(st.sampled_from(KINDS), *[st.integers(0, 1000)] * 4), min_size=7, max_size=48
)


@dataclass(frozen=True)
class Draw:
    """One step as it meets the values made before: `x` is value `i`, `d` one of its dims."""

    made: Values
    i: int
    b: int
    d: int
    which: int
    jumps: bool

    @property
    def x(self) -> torch.Tensor:
        return self.made[self.i]

    def pick(self, options: list[Any]) -> Any:
        return options[self.which % len(options)]

    def beside(self, fits: Callable[[torch.Tensor], bool]) -> int | None:
        """Return one of the values that broadcast to x and fit."""
        found = [j for j, y in enumerate(self.made) if broadcasts(self.x, y) and fits(y)]
        return found[self.b % len(found)] if found else None


def broadcasts(x: torch.Tensor, y: torch.Tensor) -> bool:
    pairs = zip(reversed(x.shape), reversed(y.shape), strict=False)
    return y.dim() <= x.dim() and all(n in (m, 1) for m, n in pairs)


def _by_kind(x: torch.Tensor, floats: list[Any], wholes: list[Any], bools: list[Any]) -> list[Any]:
    return floats if x.is_floating_point() else bools if x.dtype is torch.bool else wholes


def _pointwise(kind: str, s: Draw) -> Call | None:
    """Ops that jump at a float are chosen only with `jumps`: there a rounding error decides."""
    i, x = s.i, s.x
    if kind == "unary":
        op = s.pick(_by_kind(x, UNARY, WHOLE_UNARY, [torch.logical_not]))
        return lambda m: op(m[i])
    if kind == "compare" and x.is_floating_point():
        j = s.beside(lambda y: y.is_floating_point())
        return None if j is None or not s.jumps else lambda m: m[i] >= m[j]
    if kind in ("binary", "compare"):
        floats = x.is_floating_point()
        whole = s.b % 3 == 0
        j = s.beside(lambda y: (floats and whole) or y.is_floating_point() == floats)
        if j is None:
            return None
        op2 = s.pick(_by_kind(x, BINARY, WHOLE_BINARY, BOOL_BINARY))
        return lambda m: op2(m[i], m[j])
    if kind == "where":
        j, k = s.beside(lambda y: y.dtype is torch.bool), s.beside(lambda y: True)
        if j is None:
            return None
        if s.which % 2:
            return lambda m: m[i].masked_fill(m[j], 1)
        return lambda m: torch.where(m[j], m[i], m[k])
    return _convert(s)


def _convert(s: Draw) -> Call | None:
    i = s.i
    if s.which % 2 and (s.jumps or not s.x.is_floating_point()):
        whole = WHOLES[s.b % 3]
        return lambda m: (
            m[i].clamp(0, 100).to(whole) if m[i].is_floating_point() else m[i].to(whole)
        )
    halves = [torch.float32, torch.bfloat16, torch.float16]
    return lambda m: m[i].to(m[0].dtype if m[0].dtype is torch.float64 else halves[s.b % 3])


def _along(kind: str, s: Draw) -> Call | None:
    """Reductions, normalizations and running sums of a value with dims."""
    i, d, keep, x = s.i, s.d, bool(s.b % 2), s.x
    floats = x.is_floating_point()
    if kind == "reduce":
        op = s.pick(_by_kind(x, REDUCE, WHOLE_REDUCE, BOOL_REDUCE))
        return lambda m: op(m[i], d, keep)
    if kind == "normal":
        op1 = s.pick(NORMAL)
        return (lambda m: op1(m[i])) if floats else None
    if kind == "running":
        return lambda m: m[i].cumsum(d) * 0.1 if floats else m[i].cumsum(d)
    if kind == "product" and floats and x.dim() >= 2:
        if s.which % 3 == 0 and x.dim() >= 3:
            return lambda m: F.scaled_dot_product_attention(m[i], m[i], m[i])
        if s.which % 3 == 1:
            return lambda m: (m[i] @ m[i].mT * 0.2).softmax(-1) @ m[i]
        return lambda m: m[i] @ m[i].mT * 0.2
    if kind == "positions" and (s.jumps or not floats):
        return lambda m: m[i].argmin(d)
    return None


def _move(kind: str, s: Draw) -> Call | None:
    """Views, and ops that read a value at other places."""
    i, d, b, x = s.i, s.d, s.b, s.x
    rank = x.dim()
    if kind == "permute":
        return lambda m: m[i].transpose(b % rank, d)
    if kind == "merge" and rank >= 2:
        return lambda m: m[i].flatten(b % (rank - 1), b % (rank - 1) + 1)
    if kind == "flip":
        return lambda m: m[i].flip(d)
    if kind == "roll":
        return lambda m: m[i].roll(b % 5 - 2, d)
    if kind == "pad":
        return lambda m: F.pad(m[i], (b % 3, s.which % 2), value=b % 2)
    if kind == "triangle" and rank >= 2:
        return lambda m: m[i].tril(b % 3 - 1) if s.which % 2 else m[i].triu(b % 3 - 1)
    if kind == "repeat":
        return lambda m: m[i].repeat_interleave(2, d) if s.which % 2 else torch.stack([m[i]] * 2, d)
    if kind == "take":
        places = [j for j, y in enumerate(s.made) if y.dtype in WHOLES[:2] and y.dim() == 1]
        j = places[b % len(places)] if places else 0
        return (lambda m: m[i].index_select(d, m[j] % m[i].shape[d])) if places else None
    return None


def _take_apart(kind: str, s: Draw) -> Call | None:
    i, d, b, x = s.i, s.d, s.b, s.x
    even = [k for k, n in enumerate(x.shape) if n % 2 == 0 and n]
    k = even[b % len(even)] if even else 0
    if kind == "split" and even and x.dim() < 4:
        return lambda m: m[i].unflatten(k, (2, m[i].shape[k] // 2))
    if kind == "slice" and even:
        return lambda m: m[i].narrow(k, b % 2, m[i].shape[k] // 2)
    if kind == "cat":
        return lambda m: torch.cat([m[i], m[i] * 2 if b % 2 else m[i].flip(d)], dim=d)
    if kind == "select":
        return lambda m: m[i].select(d, 0)
    if kind == "expand" and x.dim() < 4:
        return lambda m: m[i].unsqueeze(0).expand(2, *m[i].shape)
    return None


def choose(step: Step, made: Values, jumps: bool) -> Call | None:
    """Return the step as a function of all that was made before; None where it does not fit.

    Everything is decided on real tensors, so that tracing with symbolic sizes decides nothing.
    """
    kind, a, b, c, which = step
    # Recent values make programs deep; without a preference most of them would be whole numbers.
    places = [j for j, y in enumerate(made) if y.is_floating_point()] if c % 2 else range(len(made))
    i = places[-1 - a % (min(len(places), 4) if b % 4 else len(places))]
    rank = made[i].dim()
    s = Draw(made, i, b, c // 2 % max(rank, 1), which, jumps)
    if kind in ("unary", "binary", "where", "convert", "compare"):
        return _pointwise(kind, s)
    if kind == "unsqueeze" and rank < 4:
        return lambda m: m[i].unsqueeze(b % (rank + 1))
    if rank == 0:
        return None
    return _along(kind, s) or _move(kind, s) or _take_apart(kind, s)


@dataclass(frozen=True)
class Program:
    """The drawn calls as one function of the inputs; it returns the last `outputs` values.

    calls: None stands for one whose value no other needs: two thirds of those that are drawn.
    """

    calls: tuple[Call | None, ...]
    dtypes: tuple[torch.dtype, ...]
    outputs: int

    def __call__(self, *given: torch.Tensor) -> Values:
        return self.run(given)

    def run(self, given: tuple[torch.Tensor, ...], noise: bool | float = False) -> Values:
        """noise: the relative error of each call; True for one rounding to the dtype it has."""
        values = list(given)
        for call, dtype in zip(self.calls, self.dtypes, strict=True):
            if call is None:
                values.append(values[0])
                continue
            value = call(values)
            if noise and value.is_floating_point():
                eps = torch.finfo(dtype).eps if noise is True else noise
                value = value * (1 + eps * (2 * torch.rand_like(value) - 1))
            values.append(value)
        return values[-self.outputs :]


class _Watched(list[torch.Tensor]):
    """Values that note which of them are read, by their places."""

    read: frozenset[int] = frozenset()

    def __getitem__(self, place: Any) -> Any:
        self.read |= {place}
        return super().__getitem__(place)


def write_program(
    drawn: list[Step], outputs: int, inputs: Values, jumps: bool = True, largest: int = 5000
) -> Program:
    """Return those of the drawn steps that eager PyTorch runs, with results in a sane range, and
    that the outputs need."""
    calls: list[Call] = []
    reads: list[frozenset[int]] = []
    made = _Watched(inputs)
    for step in drawn:
        call = choose(step, made, jumps)
        made.read = frozenset()
        try:
            result = None if call is None else call(made)
        except (RuntimeError, TypeError, IndexError):
            continue  # an op that this dtype or shape does not have
        if call is None or result is None or result.dim() > 4 or not sane(result, largest):
            continue
        calls.append(call)
        reads.append(made.read)
        made.append(result)
    dtypes = tuple(x.dtype for x in list(made)[len(inputs) :])
    outputs = min(outputs, len(calls))
    needed = set(range(len(made) - outputs, len(made)))
    kept: list[Call | None] = list(calls)
    for k in reversed(range(len(calls))):
        if len(inputs) + k in needed:
            needed |= reads[k]
        else:
            kept[k] = None
    return Program(tuple(kept), dtypes, outputs)


def sane(x: torch.Tensor, largest: int) -> bool:
    if x.numel() == 0 or x.numel() >= largest:
        return False
    return bool((x.double().abs() <= LARGEST).all())


def draw_inputs(draw: random.Random, dtypes: tuple[torch.dtype, ...], largest: int) -> Values:
    """Two floats (the second broadcasts), a row, a mask and whole numbers, of one shape."""
    sizes = [n for n in (1, 2, 3, 4, 5, 6, 7, 8, 33) if n <= largest]
    shape = [draw.choice(sizes) for _ in range(draw.randint(1, 3))]
    thin = [draw.choice((n, 1)) for n in shape]
    torch.manual_seed(draw.randint(0, 99))
    dtype, other, whole = draw.choice(dtypes), draw.choice(dtypes), draw.choice(WHOLES)
    x = torch.randn(shape[::-1]).permute(*range(len(shape))[::-1])
    if draw.random() < 0.5:
        x = x.contiguous()
    return [
        x.to(dtype), torch.randn(thin).to(dtype), torch.randn(shape[-1:]).to(other),
        torch.rand(thin) < 0.5, torch.randint(0, 9, shape).to(whole),
        torch.randint(0, 9, shape[-1:]),
    ]  # fmt: skip


def inputs(
    dtypes: tuple[torch.dtype, ...] = (torch.float32,), largest: int = 7
) -> st.SearchStrategy[Values]:
    """Hypothesis's strategy of the same."""
    return st.randoms(use_true_random=False).map(lambda draw: draw_inputs(draw, dtypes, largest))


def grow(inputs: Values) -> Values:
    """Return inputs of twice every size but 1, in the same memory order, that one capture takes."""
    for d in range(max(x.dim() for x in inputs)):
        inputs = [_double(x, d) if d < x.dim() and x.shape[d] > 1 else x for x in inputs]
    return inputs


def _double(x: torch.Tensor, d: int) -> torch.Tensor:
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    dense = torch.cat([x, x.flip(d)], d).permute(order).contiguous()
    return dense.permute([order.index(k) for k in range(x.dim())])


def widen(inputs: Values) -> tuple[torch.Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)
