"""Pieces of random modules: each reads one kind of thing that decides what a forward computes.

In: a random generator. Out: an `nn.Module` of (batch, seq, 8) to the same, whose `change_*` methods
alter what it reads; `argument(n, x)`, where it has one, makes the argument that it is called with::

    piece = Flag(random.Random(0)); piece.change_scale(3); piece(x, None)
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import enum
import functools
import random
import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

WIDTH = 8
NUMBERS = (1.0, 2.0, 0.5, -1.5, 0.0, -0.0, 3.0)
ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (nn.ReLU, nn.Tanh, nn.Identity, nn.SiLU)

FACTOR: Any = 1.0
TABLE: dict[str, float] = {"a": 1.0}


def _twist(x: torch.Tensor) -> torch.Tensor:
    return x + FACTOR


TWISTS: tuple[Any, ...] = (_twist, torch.tanh, functools.partial(torch.mul, other=0.5))
twist = _twist


def forget_globals() -> None:
    """Set this module's globals to what they are at the beginning."""
    globals().update(FACTOR=1.0, twist=_twist)
    TABLE.clear()
    TABLE["a"] = 1.0


def find_number(n: int) -> float:
    return NUMBERS[n % len(NUMBERS)]


class Piece(nn.Module):
    """One piece; `argument` is for those that read one."""

    argument: ClassVar[Any] = None

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.kind = draw.randrange(1000)

    @classmethod
    def changes(cls) -> list[str]:
        return sorted(name for name in dir(cls) if name.startswith("change_"))


class Size(Piece):
    """Branches on a size, asked in several ways."""

    def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        d, k = self.kind % 2, self.kind // 2 % 4
        n = x.shape[d]
        asked: list[Callable[[], bool]] = [
            lambda: n == k, lambda: n > k, lambda: n % 2 == 0, lambda: bool(n),
            lambda: not x.numel(), lambda: x.size(0) == x.size(1), lambda: len(x) >= k,
            lambda: n in (1, 3), lambda: max(n, 2) == 2, lambda: x.shape[:2] == (2, 1),
            lambda: min(x.shape[:2]) <= 1, lambda: n // 2 == 1, lambda: x.numel() == 8,
            lambda: 1 < n < 4, lambda: x.shape[0] * x.shape[1] > 4, lambda: n**2 == 9,
        ]  # fmt: skip
        return x * 2 if asked[self.kind // 8 % len(asked)]() else x + 1


class Amount(Piece):
    """Computes with sizes as numbers."""

    def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        b, t = x.shape[0], x.shape[1]
        made: list[Callable[[], Any]] = [
            lambda: x * t, lambda: x / max(t, 1), lambda: x + min(b, 2), lambda: x - t % 3,
            lambda: x + torch.arange(t, device=x.device)[:, None], lambda: x * (t // 2),
            lambda: x + torch.ones(b, 1, 1) * t, lambda: x + float(t > 1), lambda: x / t**0.5,
            lambda: x.sum(1, keepdim=True) / max(t - 1, 1) + x, lambda: x + (1 if t else 5),
            lambda: x * torch.tensor(t), lambda: x + len(x.shape[1:]), lambda: x * -(-t // 2),
            lambda: x.mean(1, keepdim=True) + x, lambda: x * (t == 1) + t * (b != 1),
        ]  # fmt: skip
        return torch.tanh(made[self.kind % len(made)]())


class Slice(Piece):
    """Slices that clamp, then a sum over them."""

    def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        t, k = x.shape[1], self.kind % 3 + 1
        made: list[Callable[[], torch.Tensor]] = [
            lambda: x[:, :k], lambda: x[:, -k:], lambda: x[:, k:], lambda: x[:, : t // 2],
            lambda: x[:, t // 2 :], lambda: x[:, ::k], lambda: x.narrow(1, 0, min(t, k)),
            lambda: x[:, k:-1], lambda: F.pad(x, (0, 0, k, 0))[:, :t], lambda: x[:, :-k],
            lambda: torch.cat([x[:, -1:], x], 1), lambda: x[:k].sum(0, keepdim=True),
            lambda: x[:, : max(t - k, 0)], lambda: torch.cat(x.split(2, 1), 1), lambda: x[-k:, :1],
            lambda: torch.cat([p * 2 for p in x.chunk(2, 1)], 1), lambda: x[:, [0]],
        ]  # fmt: skip
        part = made[self.kind // 3 % len(made)]()
        return torch.tanh(x + part.sum((0, 1)))


class Shaped(Piece):
    """Asks for ranks, layouts, dtypes and what a tensor is."""

    def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        asked: list[Callable[[], bool]] = [
            lambda: x.is_contiguous(), lambda: x.stride(1) == WIDTH, lambda: x.dtype.itemsize == 4,
            lambda: x.dtype is torch.float64, lambda: x.requires_grad, lambda: x.stride(0) == 0,
            lambda: x.transpose(0, 1).is_contiguous(), lambda: x.storage_offset() == 0,
        ]  # fmt: skip
        return x * 2 if asked[self.kind % len(asked)]() else x + 1


class Mode(enum.Enum):
    """What a flag may be too."""

    NONE = 0
    SOME = 1


class Flag(Piece):
    """Plain attributes: bool, float, int, string, enum, dtype, one that may be missing."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self.on, self.scale, self.count, self.mode = True, 1.0, 1, "a"
        self.member: Any = Mode.SOME
        self.wide: Any = torch.float64

    def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        if self.on:
            x = x * self.scale
        for _ in range(self.count):
            x = x + 0.5
        x = {"a": torch.tanh, "b": torch.relu}.get(self.mode, torch.neg)(x)
        if self.member is Mode.SOME:
            x = x.to(self.wide).to(x.dtype) - 1
        return x + getattr(self, "extra", 0)

    def change_on(self, n: int) -> None:
        self.on = (True, False, 1, 0, None, [], [0])[n % 7]

    def change_scale(self, n: int) -> None:
        self.scale = (*NUMBERS, 2, True)[n % 9]

    def change_count(self, n: int) -> None:
        self.count = n % 4

    def change_mode(self, n: int) -> None:
        self.mode = "abc"[n % 3]

    def change_member(self, n: int) -> None:
        self.member = (Mode.NONE, Mode.SOME, None)[n % 3]

    def change_wide(self, n: int) -> None:
        self.wide = (torch.float64, torch.float32, torch.bfloat16)[n % 3]

    def change_extra(self, n: int) -> None:
        if n % 3 and hasattr(self, "extra"):
            del self.extra
        else:
            self.extra = find_number(n)


class OfClass(Piece):
    """Attributes of the class, a property, a method that an instance or the class replaces."""

    def __new__(cls, draw: random.Random | None = None) -> Any:
        if draw is None:  # a copy, of the same class
            return super().__new__(cls)
        return super().__new__(type("OfClassHere", (cls,), {"scale": 1.0, "shift": 1.0}))

    @property
    def both(self) -> Any:
        return self.scale * 2 + type(self).shift  # type: ignore[operator]

    def step(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)

    def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        return self.step(x * self.both + self.shift)

    def change_class(self, n: int) -> None:
        setattr(type(self), ("scale", "shift")[n % 2], find_number(n // 2))

    def change_shadow(self, n: int) -> None:
        if n % 3 and "scale" in vars(self):
            del self.scale
        else:
            self.scale = find_number(n)

    def change_method(self, n: int) -> None:
        if n % 3 and "step" in vars(self):
            del self.step
        else:
            self.step = (torch.relu, torch.neg, lambda x: x - 2)[n % 3]  # type: ignore[method-assign]

    def change_class_method(self, n: int) -> None:
        by = (OfClass.step, lambda self, x: x * 3, lambda self, x: x.sin())[n % 3]
        type(self).step = by  # type: ignore[method-assign]


@dataclasses.dataclass
class Inner:
    """A configuration in a configuration."""

    scale: float = 1.0
    on: bool = True


class Config(Piece):
    """Nested configuration objects."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self.config = types.SimpleNamespace(inner=Inner(), sizes=[1, 2], by={"x": Inner()})

    def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        config = self.config
        x = x * config.inner.scale if config.inner.on else x - 1
        for n in config.sizes:
            x = x + n
        if "y" in config.by:
            x = x * config.by["y"].scale
        return torch.tanh(x) * getattr(config, "late", 1.0)

    def change_inner(self, n: int) -> None:
        self.config.inner.scale = find_number(n)

    def change_on(self, n: int) -> None:
        self.config.inner.on = bool(n % 2)

    def change_sizes(self, n: int) -> None:
        if n % 3 == 0 and self.config.sizes:
            self.config.sizes.pop()
        else:
            self.config.sizes.append(n % 3)

    def change_by(self, n: int) -> None:
        if n % 3:
            self.config.by["y"] = Inner(find_number(n))
        else:
            self.config.by.pop("y", None)

    def change_late(self, n: int) -> None:
        self.config.late = find_number(n)

    def change_whole(self, n: int) -> None:
        self.config = copy.deepcopy(self.config)
        self.config.inner = Inner(find_number(n), n % 2 == 0)


class Held(Piece):
    """Containers: dict, list, set, deque, tuple, a plain tensor, a generator of functions."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self.table: Any = {"a": 1.0, 1: 2.0}
        self.items: Any = [1.0, [2.0]]
        self.some: Any = {1, 2}
        self.last: Any = collections.deque([0.5], maxlen=2)
        self.plain = torch.full((WIDTH,), 0.5)
        self.do: Any = [torch.tanh]

    def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        for value in self.table.values():
            x = x + value
        x = x * len(self.items) + self.items[1][0]
        x = x + (1 in self.some) + self.last[-1]
        for do in self.do:
            x = do(x)
        return x * self.plain.to(x.dtype)

    def change_table(self, n: int) -> None:
        self.table[("a", 1, "c")[n % 3]] = find_number(n // 3)

    def change_table_less(self, n: int) -> None:
        self.table.pop(("a", 1, "c")[n % 3], None)

    def change_items(self, n: int) -> None:
        self.items[1][0] = find_number(n)

    def change_more(self, n: int) -> None:
        self.items = [*self.items[:2], n] if n % 2 else tuple(self.items[:2])

    def change_some(self, n: int) -> None:
        (self.some.add if n % 2 else self.some.discard)(1)

    def change_last(self, n: int) -> None:
        self.last.append(find_number(n))

    def change_plain(self, n: int) -> None:
        if n % 3 == 0:
            self.plain = torch.full((WIDTH,), find_number(n))
        elif n % 3 == 1:
            self.plain.fill_(find_number(n))
        else:
            self.plain = self.plain[:1].clone()

    def change_do(self, n: int) -> None:
        self.do[:] = [(torch.tanh, torch.relu, torch.neg)[n % 3]] * (n // 3 % 2 + 1)


class Named(Piece):
    """Globals of this file, a closure's cell, a callable object's attribute."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self.inside, self.set_inside = _closure()
        self.call = _Scaled(1.0)

    def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        x = twist(x * FACTOR) + TABLE.get("a", -1.0)
        return torch.tanh(self.call(self.inside(x)))

    def change_factor(self, n: int) -> None:
        globals()["FACTOR"] = find_number(n)

    def change_function(self, n: int) -> None:
        globals()["twist"] = TWISTS[n % len(TWISTS)]

    def change_table(self, n: int) -> None:
        if n % 3:
            TABLE["a"] = find_number(n)
        else:
            TABLE.pop("a", None)

    def change_cell(self, n: int) -> None:
        self.set_inside(find_number(n))

    def change_object(self, n: int) -> None:
        self.call.by = find_number(n)

    def change_partial(self, n: int) -> None:
        self.call = functools.partial(torch.add, other=find_number(n)) if n % 2 else _Scaled(2.0)  # type: ignore[assignment]


class _Scaled:
    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.by


def _closure() -> tuple[Callable[[Any], Any], Callable[[Any], None]]:
    by: Any = 1.0

    def inside(x: torch.Tensor) -> torch.Tensor:
        return x + by

    def set_inside(value: Any) -> None:
        nonlocal by
        by = value

    return inside, set_inside
