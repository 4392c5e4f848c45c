"""Returned arguments: what a call changes among its arguments, and which of that it returns.

In: a call's arguments, before and after its code has run, and its output. Out: the containers that
both the arguments and the output hold. A call then fills the caller's own container and returns
that, as eager mode does; what changes and is not returned is named, to be refused::

    batch["y"] = f(batch["x"]); return batch  ->  (ReturnedContainer(given=(0,), made=(), ...),)
    batch["y"] = f(batch["x"]); return x      ->  ["'batch'"]
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from turbotx.capture.arguments import is_leaf
from turbotx.capture.module_state.recorder import slots_of
from turbotx.capture.module_state.values import dict_of
from turbotx.errors import CaptureError, InputError

Path = tuple[int | str, ...]
"""The keys and indices that lead to a part of a value."""
_LISTS = (list, deque)


@dataclass(frozen=True)
class ReturnedContainer:
    """A container of the arguments and of the output.

    given: its path from the arguments, the first step a position or a name. made: from the output.
    changed: whether the call changes its entries, and not only what lies in them.
    """

    given: Path
    made: Path
    changed: bool = True


class PassedArguments:
    """A call's arguments as they are before its code runs.

    Raises CaptureError for a dict with tensors as keys: the code would find none of them.
    """

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        self._paths = {id(x): path for path, x in reversed(find_containers(args, kwargs))}
        self._before = [
            (name, part, _contents(part)) for name, value in named for part in _parts(value, set())
        ]
        for name, part, _ in self._before:
            if isinstance(part, dict) and any(isinstance(key, torch.Tensor) for key in part):
                raise CaptureError(
                    f"its argument {_show(name)} has a dict whose keys are tensors, which a "
                    "program does not see: pass a list of pairs"
                )

    def find_returned(self, output: Any) -> tuple[tuple[ReturnedContainer, ...], list[str]]:
        """Return which containers are in the output, innermost first; and the names of the
        arguments in which something was changed that is not returned, or that cannot be filled
        anew."""
        made = [(path, x) for path, x in _containers(output, ()) if id(x) in self._paths]
        refilled = {id(x) for _, x in made if _can_be_filled(x)}
        changed, lost = set[int](), dict[str, None]()
        for name, part, before in self._before:
            now = _contents(part)
            if now != before:
                changed.add(id(part))
                if now.attributes != before.attributes or id(part) not in refilled:
                    lost[_show(name)] = None
        found = [ReturnedContainer(self._paths[id(x)], path, id(x) in changed) for path, x in made]
        return tuple(sorted(found, key=lambda one: -len(one.made))), list(lost)


def find_containers(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[Path, Any]]:
    """Return the containers among the arguments that can be filled anew, and their paths."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return [found for name, value in named for found in _containers(value, (name,))]


def give_back(
    returned: Sequence[ReturnedContainer],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: Any,
) -> Any:
    """Fill the caller's containers with what a call has made of them; return the output that holds
    them. Raises InputError if one of them is passed in two places, of which the call's code has
    seen one change."""
    passed = [_at(args if isinstance(r.given[0], int) else kwargs, r.given) for r in returned]
    changed = {id(x): one.given for one, x in zip(returned, passed, strict=True) if one.changed}
    if changed:
        counts = Counter(id(x) for _, x in find_containers(args, kwargs))
        for key, path in changed.items():
            if counts[key] > 1:
                raise InputError(
                    f"the call changes its argument {path[0]!r}, and the same container is passed "
                    f"in {counts[key]} places: pass a copy in each place"
                )
    for one, given in zip(returned, passed, strict=True):
        if one.changed:
            made = _at(output, one.made)
            given.clear()
            (given.extend if isinstance(given, _LISTS) else given.update)(made)
        output = _put(output, one.made, given)
    return output


def _containers(tree: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Yield the lists, deques and dicts of a tree, with their paths."""
    if isinstance(tree, dict) or type(tree) in _LISTS:
        yield path, tree
    if isinstance(tree, dict):
        for key, value in tree.items():
            if isinstance(key, (int, str)):
                yield from _containers(value, (*path, key))
    elif isinstance(tree, (*_LISTS, tuple)):
        for k, value in enumerate(tree):
            yield from _containers(value, (*path, k))


def _show(name: int | str) -> str:
    return repr(name) if isinstance(name, str) else f"number {name}"


def _can_be_filled(container: Any) -> bool:
    """Return whether a container's entries can be replaced: not those of transformers' outputs,
    which are dicts and dataclasses."""
    return not dataclasses.is_dataclass(container)


@dataclass(frozen=True)
class _Contents:
    """What an object holds directly, each value as what tells it from others. kept: the values, so
    that no other can have their ids."""

    items: tuple[Any, ...]
    attributes: tuple[Any, ...]
    kept: list[Any] = field(compare=False)


def _contents(value: Any) -> _Contents:
    items, attributes = _held(value)
    return _Contents(
        tuple((_tell(a), _tell(b)) for a, b in items),
        tuple((name, _tell(x)) for name, x in attributes),
        [items, attributes],
    )


def _held(value: Any) -> tuple[list[tuple[Any, Any]], list[tuple[str, Any]]]:
    """Return the items and the attributes of a container or an object."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items += dict.items(value)
    elif isinstance(value, (*_LISTS, tuple)):
        items += enumerate(value)
    elif isinstance(value, (set, frozenset)):
        items += ((None, x) for x in sorted(value, key=id))
    slots = [n for n in slots_of(type(value)) if hasattr(value, n)]
    own = [(n, getattr(value, n)) for n in slots]
    return items, [*own, *(dict_of(value) or {}).items()]


def _tell(value: Any) -> Any:
    """Return what tells a value from others: a plain one's class and text, or which it is."""
    plain = value is None or type(value) in (bool, int, float, str)
    return (type(value), repr(value)) if plain else id(value)


def _parts(value: Any, seen: set[int]) -> Iterator[Any]:
    """Yield the containers and objects in a value that is no leaf, at any depth."""
    if (is_leaf(value) and not isinstance(value, set)) or id(value) in seen:
        return
    seen.add(id(value))
    yield value
    items, attributes = _held(value)
    for first, second in (*items, *attributes):
        yield from _parts(first, seen)
        yield from _parts(second, seen)


def _at(tree: Any, path: Iterable[int | str]) -> Any:
    for step in path:
        tree = tree[step]
    return tree


def _put(tree: Any, path: Path, value: Any) -> Any:
    """Return the tree with the value at a path; tuples on the way are made anew."""
    if not path:
        return value
    *way, last = path
    parent = _at(tree, way)
    if isinstance(parent, tuple):
        items = [value if k == last else x for k, x in enumerate(parent)]
        anew = parent._make(items) if hasattr(parent, "_make") else type(parent)(items)
        return _put(tree, tuple(way), anew)
    parent[last] = value
    return tree
