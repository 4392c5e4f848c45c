"""Returned arguments: lists and dicts among a call's arguments that its output holds.

In: a traced call's arguments and output. Out: where in both the same container is. A call then
fills the caller's own container and returns that, as eager mode does::

    batch["y"] = f(batch["x"]); return batch  ->  (ReturnedContainer(given=(0,), made=()),)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

Path = tuple[int | str, ...]
"""The keys and indices that lead to a part of a value."""


@dataclass(frozen=True)
class ReturnedContainer:
    """A container of the arguments and of the output.

    given: its path from the arguments, the first step a position or a name. made: from the output.
    """

    given: Path
    made: Path


def find_containers(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[Path, Any]]:
    """Return the containers among the arguments, before code changes them, and their paths."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return [found for name, value in named for found in _containers(value, (name,))]


def find_returned(passed: Sequence[tuple[Path, Any]], output: Any) -> tuple[ReturnedContainer, ...]:
    """Return which of the containers that were passed are in the output, innermost first."""
    paths = {id(container): path for path, container in reversed(passed)}
    found = [
        ReturnedContainer(paths[id(container)], path)
        for path, container in _containers(output, ())
        if id(container) in paths
    ]
    return tuple(sorted(found, key=lambda one: -len(one.made)))


def give_back(
    returned: Sequence[ReturnedContainer],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: Any,
) -> Any:
    """Fill the caller's containers with what a call has made of them; return the output that holds
    them."""
    passed = [_at(args if isinstance(r.given[0], int) else kwargs, r.given) for r in returned]
    for one, given in zip(returned, passed, strict=True):
        made = _at(output, one.made)
        if isinstance(given, list):
            given[:] = made
        else:
            given.clear()
            given.update(made)
        output = _put(output, one.made, given)
    return output


def _containers(tree: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Yield the lists and mappings of a tree that can be filled anew, with their paths."""
    # transformers' outputs are dicts and dataclasses, whose entries cannot be replaced at once.
    is_mapping = isinstance(tree, MutableMapping) and not dataclasses.is_dataclass(tree)
    if is_mapping or type(tree) is list:
        yield path, tree
    if is_mapping:
        for key, value in tree.items():
            if isinstance(key, (int, str)):
                yield from _containers(value, (*path, key))
    elif isinstance(tree, (list, tuple)):
        for k, value in enumerate(tree):
            yield from _containers(value, (*path, k))


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
