"""Arguments in any container are inputs; what cannot be taken apart is refused by name.

In: functions of objects that hold tensors and numbers. Out: eager's results however the objects
change between calls, and messages that name the argument.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import math
import threading
import types
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import turbotx
from turbotx.capture.arguments import describe_leaf, flatten_call, rebuild
from turbotx.errors import CaptureError, InputError, SaveError


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@dataclasses.dataclass
class Pair:
    a: Any
    b: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    a: Any
    b: Any = None


@dataclasses.dataclass(slots=True)
class Slotted:
    a: Any
    b: Any = None


class Plain:
    def __init__(self, a, b=None):
        self.a, self.b = a, b


class Slots:
    __slots__ = ("a", "b")

    def __init__(self, a, b=None):
        self.a, self.b = a, b


class Named(NamedTuple):
    a: Any
    b: Any = None


class Mapped(dict):
    def __init__(self, a=None, b=None, **rest):
        super().__init__(a=a, b=b, **rest)

    @property
    def a(self):
        return self["a"]

    @property
    def b(self):
        return self["b"]


class Ordered(collections.OrderedDict):
    a = property(lambda self: self["a"])
    b = property(lambda self: self["b"])


class User(collections.UserDict):
    a = property(lambda self: self["a"])
    b = property(lambda self: self["b"])


class Items(list):
    a = property(lambda self: self[0])
    b = property(lambda self: self[1])


class Stateful:
    """Its state is of its own making."""

    def __init__(self, a, b=None):
        self.hidden = [a, b]

    def __getstate__(self):
        return tuple(self.hidden)

    def __setstate__(self, state):
        self.hidden = list(state)

    a = property(lambda self: self.hidden[0])
    b = property(lambda self: self.hidden[1])


MAKERS = {
    "dataclass": Pair,
    "frozen": Frozen,
    "slots of a dataclass": Slotted,
    "object": Plain,
    "slots": Slots,
    "namedtuple": Named,
    "dict": Mapped,
    "OrderedDict": lambda a, b: Ordered(a=a, b=b),
    "UserDict": lambda a, b: User(a=a, b=b),
    "list": lambda a, b: Items([a, b]),
    "namespace": lambda a, b: types.SimpleNamespace(a=a, b=b),
    "state": Stateful,
    "nested": lambda a, b: Pair({"x": [Plain(a)]}, Named(b)),
}


def add(x, given):
    a, b = given.a, given.b
    a = a["x"][0].a if isinstance(a, dict) else a
    b = b.a if isinstance(b, Named) else b
    return x + a * 2 - b


@pytest.mark.parametrize("name", MAKERS)
def test_tensors_in_any_object_are_inputs(name) -> None:
    make, fast = MAKERS[name], turbotx.optimize(add)
    for k in range(3):
        x = torch.randn(2 + k, 3)
        given = make(torch.randn(2 + k, 3), torch.randn(3))
        torch.testing.assert_close(fast(x, given), add(x, given))
        torch.testing.assert_close(fast(x, given=given), add(x, given))
    assert fast.stats()["captures"] == 2  # by position and by name


def test_a_field_that_is_replaced() -> None:
    fast, x, held = turbotx.optimize(add), torch.ones(2), Plain(torch.ones(2), torch.zeros(2))
    fast(x, held)
    held.a = torch.full((2,), 7.0)
    assert torch.equal(fast(x, held), add(x, held))
    held.b = 3.5
    assert torch.equal(fast(x, held), add(x, held))
    held.b = 4.5
    assert torch.equal(fast(x, held), add(x, held))
    assert fast.stats()["captures"] == 2


def test_a_read_only_mapping_and_a_slice() -> None:
    fast = turbotx.optimize(lambda x, m, s: x[s] + m["a"])
    x = torch.randn(6, 3)
    for s in (slice(0, 2), slice(1, 3), slice(None, None, 2), slice(0, 2)):
        m = types.MappingProxyType({"a": torch.randn(3)})
        torch.testing.assert_close(fast(x, m, s), x[s] + m["a"])


class Mode(enum.Enum):
    PLUS = 1
    MINUS = 2


@pytest.mark.parametrize(
    "values",
    [
        (True, 1, 2, False, 0),
        ("plus", "minus", "plus"),
        (Mode.PLUS, Mode.MINUS),
        ([1, 2], [2, 1], [1, 2, 3]),
        (torch.Size([1, 2]), torch.Size([2, 1])),
        (torch.float32, torch.float64),
        (range(2), range(3)),
        (None, 1),
        (np.float64(0.0), np.float64(-0.0)),
        (np.int64(1), np.int64(2)),
        (frozenset((1, 2)), frozenset((1, 3))),
        (1 + 2j, 1 - 2j),
        (0.0, -0.0),
        (math.nan, 1.0, math.inf, -math.inf),
        ({"k": 1}, {"k": True}, {"k": 1.0}),
    ],
    ids=str,
)
def test_constants_that_change(values) -> None:
    def code(x, c):
        return x + sum(map(ord, repr(c)))

    fast, x = turbotx.optimize(code, backend="aten"), torch.zeros(2, dtype=torch.float64)
    for value in (*values, *values):
        assert torch.equal(fast(x, value), code(x, value)), value
    assert fast.stats()["captures"] == len(set(map(repr, values)))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (np.ones(3), "'c' is a numpy.ndarray.*from_numpy"),
        (nn.Linear(2, 2), "'c' is a torch.nn.modules.linear.Linear.*part of the model"),
        (torch.Generator(), "'c' is a torch.*Generator"),
        (iter([1]), "'c' is a list_iterator"),
        ((k for k in (1, 2)), "'c' is a generator"),
        (threading.Lock(), "'c' is a _thread.lock"),
        (Plain(Pair({"k": np.ones(2)})), r"'c'\.a\.a\['k'\] is a numpy.ndarray"),
        ({"k": [np.ones(2)]}, r"'c'\['k'\]\[0\] is a numpy.ndarray"),
    ],
    ids=lambda v: type(v).__name__ if not isinstance(v, str) else "",
)
def test_what_cannot_be_taken_apart_is_named(value, told) -> None:
    fast = turbotx.optimize(lambda x, c=None: x + 1)
    with pytest.raises(InputError, match=told):
        fast(torch.ones(2), c=value)


def test_a_closure_and_a_circle_are_refused() -> None:
    fast, shift = turbotx.optimize(lambda x, f: f(x)), torch.ones(2)
    with pytest.raises(InputError, match="number 1 is a function"):
        fast(shift, lambda x: x + shift)
    assert torch.equal(fast(shift, torch.neg), -shift)
    assert torch.equal(fast(shift, torch.exp), shift.exp())
    held = Plain(1)
    held.b = held
    with pytest.raises(InputError, match="contains itself"):
        fast(shift, held)


def test_changes_of_arguments_are_refused_or_returned() -> None:
    def store(x, held):
        held.a = x * 2
        return x

    def append(x, items):
        items.append(x * 2)
        return x

    def grow(x, held):
        held.a = torch.cat([held.a, x])
        return held

    x = torch.ones(2)
    for function, given in ((store, Plain(x)), (append, [x])):
        with pytest.raises(CaptureError, match="changes its argument number 1"):
            turbotx.optimize(function)(x, given)
    fast, wanted = turbotx.optimize(lambda x, held: grow(x, held).a), torch.ones(4)
    with pytest.raises(CaptureError, match="changes its argument"):
        fast(x, Plain(x))

    def fill(x, d):
        d["y"] = x * 2
        return d

    got = turbotx.optimize(fill)(x, {"x": x})
    assert torch.equal(got["y"], x * 2) and wanted.shape == (4,)


def test_encodings_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    fast = turbotx.optimize(lambda batch: batch["ids"] * 2 + batch["mask"])
    for k in range(3):
        data = {"ids": torch.arange(3 + k), "mask": torch.ones(3 + k)}
        batch = transformers.BatchEncoding(data)
        torch.testing.assert_close(fast(batch), batch["ids"] * 2 + batch["mask"])
    assert fast.stats()["captures"] == 1


def test_flattening_and_rebuilding() -> None:
    x = torch.ones(2)
    args, kwargs = (x, Pair(1.5, {"k": Slots(x, None)})), {"m": Mapped(a=2, b="s")}
    leaves, structure = flatten_call(args, kwargs)
    again, named = rebuild(leaves, structure)
    assert again[1] is not args[1] and type(again[1]) is Pair
    assert again[1].b["k"].a is x and again[1].a == 1.5 and named["m"] == kwargs["m"]
    assert flatten_call(again, named)[1] == structure
    assert hash(flatten_call(again, named)[1]) == hash(structure)
    others, _ = flatten_call((x, Frozen(1.5, {"k": Slots(x, None)})), kwargs)
    assert list(map(describe_leaf, others)) != list(map(describe_leaf, leaves))
    assert describe_leaf(True) != describe_leaf(1) and describe_leaf(0.5) == describe_leaf(1.5)


def test_calls_with_objects_are_not_saved(tmp_path) -> None:
    x = torch.randn(3, 4)
    fast = turbotx.optimize(add)
    fast(x, Pair(x, x))
    with pytest.raises(SaveError, match="object"):
        turbotx.save(fast, tmp_path / "object.ttx")
