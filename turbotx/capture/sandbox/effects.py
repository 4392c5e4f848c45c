"""Effects: what a call changes in the user's containers and objects, replayed after each run.

In: what a trace wrote (`watched.py`). Out: the tensors and sizes among it, which become results of
the program, and the writes that put them in place after every call::

    self.kept["mask"] = mask; seen.append(x)  ->  [Effect(kept, Put("mask", 0)), Effect(seen, ...)]

A write that puts the same parameters where they lay is none, as nn.LSTM's list of its weights.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensor

from turbotx.capture.sandbox.leaks import PLAIN, find_leaks
from turbotx.capture.sandbox.watched import Difference, Put, Taken, Watched, apply
from turbotx.capture.traced_float import TracedFloat, read_floats
from turbotx.errors import CaptureError

_SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)


class SizesNeeded(Exception):
    """The code makes a dict key from sizes: these symbols must be constants in the trace."""

    def __init__(self, symbols: frozenset[str]) -> None:
        super().__init__(f"{sorted(symbols)} are needed as plain numbers")
        self.symbols = symbols


@dataclass(frozen=True)
class _Result:
    """Stands for result number `place` of the program's additional results."""

    place: int


@dataclass(frozen=True)
class Effect:
    """One write: `difference` applied to `target`; its value is `spec` over `leaves`."""

    target: Any
    text: str
    difference: Difference
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    makes_tensor: bool = False
    makes_size: bool = False
    """Whether the value written is a tensor of this call, or a size of it."""
    unread: bool = False
    """Whether the code did not read the previous contents."""

    @property
    def is_of_call(self) -> bool:
        """Whether it writes a tensor or a size of the call, as opposed to what no input changes."""
        return any(isinstance(leaf, _Result) for leaf in self.leaves)

    def replay(self, results: Sequence[Any]) -> None:
        """Repeat the write with the results of another run."""
        leaves = [results[x.place] if isinstance(x, _Result) else x for x in self.leaves]
        value = pytree.tree_unflatten(leaves, self.spec)
        apply(self.target, replace(self.difference, value=value))


def find_effects(
    watched: Sequence[Watched], original_of: Callable[[Any], Any], symbols: frozenset[str],
    keeps: Callable[[Any, Any], bool],
) -> tuple[list[Effect], list[Any]]:  # fmt: skip
    """Return the writes, and the tensors and sizes in them, in the order of their places.

    symbols: the names of sizes in this trace. keeps: called with the traced attributes and a name
    where the same parameters were put again; returns whether that can be guarded. Raises
    SizesNeeded if a key is made from sizes, and CaptureError if a value was written that holds a
    tensor and is not a known container.
    """
    effects: list[Effect] = []
    results: list[Any] = []
    owned = {key: x for one in watched for key, x in one.stand_ins().items()}

    def store(leaf: Any, text: str) -> Any:
        leaf = read_floats(leaf) if type(leaf) is TracedFloat else leaf
        if isinstance(leaf, (FakeTensor, *_SIZES)):
            results.append(leaf)
            return _Result(len(results) - 1)
        if type(leaf) is weakref.ref and id(leaf()) in owned:
            return weakref.ref(owned[id(leaf())])
        leaf = original_of(leaf)
        if not isinstance(leaf, (*PLAIN, torch.nn.Module, torch.Tensor)):
            inside = find_leaks(leaf, type(leaf).__name__, most=1, limit=1000)
            if inside:
                raise CaptureError(
                    f"the call stores an object that contains a tensor in {text!r} ({inside[0]}), "
                    "and a program can store only tensors, sizes and containers of them: return it"
                )
        return leaf

    for one in watched:
        for difference in one.differences():
            text, unread = one.text, one.is_unread(difference)
            if isinstance(difference, Taken):
                raise CaptureError(
                    f"the call removes or moves an entry of {text!r}, so that a call depends on "
                    "the calls before it: keep that outside of the optimized module"
                )
            if isinstance(difference, Put):
                if _puts_again(one, difference, owned) and keeps(one.traced, difference.key):
                    continue
                name = _users_key(difference.key, original_of, symbols, text)
                difference = replace(difference, key=name)
                text = f"{text}.{name}".lstrip(".") if isinstance(name, str) else f"{text}[{name}]"
            value: Any = difference.value
            known = original_of(value)
            tree, spec = pytree.tree_flatten(value) if known is value else ([known], _LEAF)
            leaves = tuple(store(leaf, text) for leaf in tree)
            effects.append(
                Effect(
                    one.target, text, difference, spec, leaves,
                    isinstance(value, FakeTensor), isinstance(value, _SIZES), unread,
                )
            )  # fmt: skip
    return effects, results


_LEAF = pytree.tree_structure(0)


def _puts_again(one: Watched, put: Put, owned: dict[int, Any]) -> bool:
    """Return whether a list of parameters is written in place of a list of the same."""
    value, before = put.value, one.before(put.key) if isinstance(one.traced, dict) else None
    if type(value) is not list or type(before) is not list or len(value) != len(before):
        return False
    pairs = [(_target(a), _target(b)) for a, b in zip(value, before, strict=True)]
    return any(id(a) in owned for a, _ in pairs) and all(
        (type(x) is weakref.ref) == (type(y) is weakref.ref) and owned.get(id(a), a) is b
        for (a, b), x, y in zip(pairs, value, before, strict=True)
    )


def _target(value: Any) -> Any:
    return value() if type(value) is weakref.ref else value


def _users_key(
    key: Any, original_of: Callable[[Any], Any], symbols: frozenset[str], text: str
) -> Any:
    """Return a key as a call outside of the trace has it; raise SizesNeeded or CaptureError for one
    made from sizes, or with a tensor."""
    if isinstance(key, torch.nn.Module):
        key = original_of(key)
    if isinstance(key, str):
        found = frozenset(s for s in symbols if re.search(rf"{s}(?!\d)", key))
        if found:
            raise SizesNeeded(found)
    if not isinstance(key, (*PLAIN, torch.nn.Module)) and find_leaks(
        key, "key", most=1, limit=1000
    ):
        raise CaptureError(f"the call stores a value in {text!r} under a key with a tensor")
    return read_floats(key) if type(key) is TracedFloat else key
