"""Arguments: flattens a call's nested arguments to a list of leaves, and rebuilds them.

In: args and kwargs: tensors and constants, in containers and objects at any depth. Out: their
leaves, a hashable structure from which `rebuild` makes the same arguments around other leaves, and
the parts of a call's key. Objects that cannot be flattened raise an error that names them::

    flatten_call((x, Batch(shift=y)), {"scale": 0.5})  ->  [x, y, 0.5], structure
"""

from __future__ import annotations

import enum
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from turbotx.errors import InputError
from turbotx.ir.memory_order import key_of

PLAIN = (bool, int, str, type(None))
"""Types of constants whose value is a part of a call's key as it is."""
_BY_VALUE = (
    *PLAIN, float, complex, bytes, type(...), range, torch.dtype, torch.device, torch.layout,
    torch.memory_format, torch.Size,
)  # fmt: skip
_BY_IDENTITY = (
    type, enum.Enum, types.BuiltinFunctionType, types.ModuleType, torch._ops.OpOverload,
    torch._ops.OpOverloadPacket,
)  # fmt: skip
_MOST_DEEP = 40


@dataclass(frozen=True)
class Opened:
    """A structure that contains objects unknown to pytree.

    parts: the index among the leaves of `spec` of each such object, and how to rebuild it.
    """

    spec: pytree.TreeSpec
    parts: tuple[tuple[int, ReducedObject], ...]


@dataclass(frozen=True)
class ReducedObject:
    """How to rebuild an object, following the protocol of `copy`: call `make`, then set the state,
    append the items and set the entries. `inner` is the structure of all of these, with `leaves`
    leaves."""

    make: Callable[..., Any]
    set_state: Callable[[Any, Any], None] | None
    inner: Any
    leaves: int


Structure = pytree.TreeSpec | Opened


class _Refused(Exception):
    """An object that cannot be flattened. path: its keys, innermost first."""

    def __init__(self, value: Any, why: str) -> None:
        super().__init__(why)
        self.value, self.why = value, why
        self.path: list[str] = []


# --- flattening ---


def flatten_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], Structure]:
    """Return the leaves of a call, tensors and constants, and their structure.

    Raises InputError, naming the argument, for an object that is neither and cannot be flattened.
    """
    tree = (tuple(args), dict(kwargs))
    try:
        return _flatten(tree, 0)
    except _Refused as error:
        path = "".join(reversed(error.path))
        raise InputError(
            f"argument {_name_argument(path)} is a {_type_name(error.value)}: {error.why}"
        ) from None


def _name_argument(path: str) -> str:
    """Turn a pytree path into an argument's name: [0][1].shift -> 1.shift, [1]['b'] -> 'b'."""
    which, rest = path[:3], path[3:]
    end = rest.find("]")
    first = rest[1:end]
    return (first if which == "[1]" else f"number {first}") + rest[end + 1 :]


def _type_name(value: Any) -> str:
    cls = type(value)
    return (
        cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    )


def _flatten(tree: Any, depth: int) -> tuple[list[Any], Structure]:
    leaves, spec = pytree.tree_flatten(tree, is_leaf=_is_size)
    if all(isinstance(x, (torch.Tensor, *PLAIN)) or is_float(x) for x in leaves):
        return leaves, spec
    made: list[Any] = []
    parts = []
    for k, leaf in enumerate(leaves):
        try:
            part = None if is_leaf(leaf) else _open(leaf, depth)
        except _Refused as error:
            keyed, _ = pytree.tree_flatten_with_path(tree, is_leaf=_is_size)
            error.path.append(pytree.keystr(keyed[k][0]))
            raise
        if part is None:
            made.append(leaf)
        else:
            inner, found = part
            made += inner
            parts.append((k, found))
    return made, Opened(spec, tuple(parts)) if parts else spec


def _is_size(value: Any) -> bool:
    return type(value) is torch.Size  # pytree would turn it into a tuple


def is_float(value: Any) -> bool:
    """Return whether a leaf is a Python float, which becomes an input of the program."""
    return type(value) is float


def is_leaf(value: Any) -> bool:
    """Return whether a value is a leaf: a tensor, an immutable constant, or an object compared by
    identity."""
    if isinstance(value, torch.Tensor) or type(value) in _BY_VALUE:
        return True
    if isinstance(value, _BY_IDENTITY):
        return not isinstance(getattr(value, "__self__", None), torch.Tensor)
    if isinstance(value, (int, str, float)) and not hasattr(value, "__dict__"):
        return True
    if type(value) is object:  # a sentinel, compared by identity
        return True
    if isinstance(value, (set, frozenset)):
        return all(is_leaf(x) and not isinstance(x, torch.Tensor) for x in value)
    if isinstance(value, types.FunctionType):
        return value.__closure__ is None
    return type(value).__module__ == "numpy" and hasattr(value, "dtype") and value.shape == ()


_REFUSALS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (
        lambda x: type(x).__module__ == "numpy" and hasattr(x, "__array__"),
        "its numbers would be constants of the program: pass torch.from_numpy(...) of it",
    ),
    (
        lambda x: isinstance(x, torch.nn.Module),
        "its parameters would be constants: make it a part of the model that is optimized",
    ),
    (
        lambda x: isinstance(x, torch.Generator),
        "a program draws from PyTorch's own generator: leave it out and seed that one",
    ),
    (
        lambda x: isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)),
        "it is a size of another trace: call the model that was given to turbotx.optimize there",
    ),
    (
        lambda x: isinstance(x, Iterator),
        "a program cannot be fed from it: pass a list of what it gives",
    ),
    (
        lambda x: isinstance(x, (types.FunctionType, types.MethodType)),
        "what it refers to may change unseen: pass the tensors and numbers that it holds, or a "
        "function that refers to nothing",
    ),
    (
        lambda x: isinstance(x, (set, frozenset)),
        "a set of tensors has no order: pass a list or a dict",
    ),
)


def _open(value: Any, depth: int) -> tuple[list[Any], ReducedObject]:
    """Flatten an object by the protocol of `copy`: return its leaves and how to rebuild it."""
    for holds, why in _REFUSALS:
        if holds(value):
            raise _Refused(value, why)
    if depth > _MOST_DEEP:
        raise _Refused(value, "it contains itself, or is nested too deep: pass its contents")
    if isinstance(value, slice):
        leaves, inner = _flatten((value.start, value.stop, value.step), depth + 1)
        return leaves, ReducedObject(_make_slice, None, inner, len(leaves))
    if isinstance(value, types.MappingProxyType):
        leaves, inner = _flatten(dict(value), depth + 1)
        return leaves, ReducedObject(types.MappingProxyType, None, inner, len(leaves))
    if type(value) in _by_bytes:
        return [], ReducedObject(Untouchable, None, type(value), 0)
    try:
        reduced = value.__reduce_ex__(2)
    except Exception as error:
        raise _Refused(value, f"it cannot be flattened ({error}): pass its contents") from None
    if isinstance(reduced, str) or not isinstance(reduced[0], Hashable):
        raise _Refused(value, "it cannot be flattened: pass its contents")
    make, args, state, items, entries = (*reduced, None, None, None)[:5]
    if len(reduced) > 5 and reduced[5] is not None:
        raise _Refused(value, "it restores its state by its own function: pass its contents")
    if isinstance(state, bytes):
        _by_bytes.add(type(value))
        return [], ReducedObject(Untouchable, None, type(value), 0)
    content = (args, state, list(items or ()), [list(pair) for pair in entries or ()])
    try:
        leaves, inner = _flatten(content, depth + 1)
    except _Refused as error:
        error.path[-1] = _shorten(error.path[-1])
        raise
    set_state = getattr(type(value), "__setstate__", None)
    return leaves, ReducedObject(make, set_state, inner, len(leaves))


_by_bytes: set[type] = set()
"""Classes whose objects are copied as bytes, which cannot be flattened."""


class Untouchable:
    """Stands in for an object that cannot be flattened during a trace; reading an attribute raises
    InputError."""

    def __init__(self, cls: type) -> None:
        self._cls = cls

    __class__ = property(lambda self: self._cls)

    def __getattr__(self, name: str) -> Any:
        cls = self._cls
        raise InputError(
            f"the model looks at .{name} of a {cls.__module__}.{cls.__qualname__} among its "
            "arguments, which cannot be flattened: pass its contents"
        )


def _make_slice(content: Any) -> slice:
    return slice(*content)


def _shorten(path: str) -> str:
    """Write the path inside an object as its user would: [1]['shift'] becomes .shift."""
    which, rest = path[:3], path[3:]
    if which == "[1]" and rest.startswith("['"):
        name, _, more = rest[2:].partition("']")
        return f".{name}{more}"
    return rest


# --- rebuilding ---


def rebuild(leaves: Sequence[Any], structure: Structure) -> Any:
    """Return args and kwargs as new containers and objects around the given leaves."""
    if isinstance(structure, pytree.TreeSpec):
        return pytree.tree_unflatten(leaves, structure)
    given, at = iter(leaves), dict(structure.parts)
    made = [
        _rebuild_part([next(given) for _ in range(part.leaves)], part)
        if (part := at.get(k)) is not None
        else next(given)
        for k in range(structure.spec.num_leaves)
    ]
    return pytree.tree_unflatten(made, structure.spec)


def _rebuild_part(leaves: Sequence[Any], part: ReducedObject) -> Any:
    if part.make is Untouchable:
        return Untouchable(part.inner)
    content = rebuild(leaves, part.inner)
    if part.make in (_make_slice, types.MappingProxyType):
        return part.make(content)
    args, state, items, entries = content
    made = part.make(*args)
    for item in items:
        made.append(item)
    for key, value in entries:
        made[key] = value
    if state is None:
        return made
    if part.set_state is not None:
        part.set_state(made, state)
        return made
    own, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    for name, value in (own or {}).items():
        made.__dict__[name] = value
    for name, value in (slots or {}).items():
        object.__setattr__(made, name, value)
    return made


# --- keys ---


def describe_leaf(leaf: Any) -> Any:
    """Return a leaf's part of the key that selects a capture: a constant's value; for a float,
    which is an input, only its type; a tensor's dtype, device, rank and memory order."""
    if isinstance(leaf, torch.Tensor):
        return key_of(leaf)
    if is_float(leaf):
        return (float,)
    return type(leaf), _value_of(leaf)


def _value_of(leaf: Any) -> Any:
    """Return a constant as a key whose equality means the same to a program: 0.0 and -0.0
    differ."""
    if isinstance(leaf, complex):
        return leaf.real.hex(), leaf.imag.hex()
    if isinstance(leaf, (set, frozenset)):
        return frozenset((type(x), _value_of(x)) for x in leaf)
    if type(leaf).__module__ == "numpy":
        return leaf.tobytes()
    return leaf


def carry(leaves: Sequence[Any]) -> list[torch.Tensor]:
    """Return the program's input tensors: the tensors in order, and floats as 0-d tensors."""
    device = next((x.device for x in leaves if isinstance(x, torch.Tensor)), None)
    return [
        x if isinstance(x, torch.Tensor) else carry_float(x, device)
        for x in leaves
        if isinstance(x, torch.Tensor) or is_float(x)
    ]


def tensors_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the program's input tensors for a call, of any shape and dtype, in the order of the
    inputs."""
    return carry(flatten_call(args, kwargs)[0])


def carry_float(value: float, device: torch.device | None) -> torch.Tensor:
    """Return a float argument as a 0-d float64 tensor, which a program reads at run time."""
    return torch.full((), value, dtype=torch.float64, device=device)
