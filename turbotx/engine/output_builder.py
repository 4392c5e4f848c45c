"""Output builder: generated code that builds a call's output from its leaves.

In: a tree spec. Out: what pytree makes of leaves, at every call; transformers' outputs, which check
and sort their fields anew each time (14 us of a call), are learnt from the first one::

    build = OutputBuilder(variant.out_spec)
    build([hidden, pooled])  ->  BaseModelOutputWithPooling(last_hidden_state=hidden, ...)
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils import _pytree as pytree

Build = Callable[[Sequence[Any]], Any]
MODEL_OUTPUTS = "transformers.utils.generic"
"""Where the class that all of transformers' outputs extend is defined."""


class OutputBuilder:
    """Makes outputs of one tree spec; thread-safe."""

    def __init__(self, spec: pytree.TreeSpec) -> None:
        self._spec = spec
        self._build: Build | None = None

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """Return the output that these leaves are of."""
        if self._build is not None:
            return self._build(leaves)
        made = pytree.tree_unflatten(leaves, self._spec)
        self._build = _learn(self._spec, leaves, 0) or self._as_pytree
        return made

    def _as_pytree(self, leaves: Sequence[Any]) -> Any:
        return pytree.tree_unflatten(leaves, self._spec)


def _learn(spec: pytree.TreeSpec, leaves: Sequence[Any], begin: int) -> Build | None:
    """Return what builds a part of the output, whose leaves begin at a place; None where only
    pytree knows how."""
    if spec.is_leaf():
        return lambda given: given[begin]
    children: list[Build] = []
    place = begin
    for child in _children(spec):
        build = _learn(child, leaves, place)
        if build is None:
            return None
        children.append(build)
        place += child.num_leaves
    if spec.type is tuple:
        return lambda given: tuple([build(given) for build in children])
    if spec.type is list:
        return lambda given: [build(given) for build in children]
    if spec.type is dict:
        keys = list(spec.context)
        return lambda given: dict(zip(keys, [build(given) for build in children], strict=True))
    if is_plain_model_output(spec.type):
        parts = [build(leaves) for build in children]
        made = pytree.tree_unflatten(leaves[begin:place], spec)
        return _learn_model_output(made, parts, children)
    return None


def _children(spec: pytree.TreeSpec) -> Sequence[pytree.TreeSpec]:
    # PyTorch 2.11 has the children as a list, later ones as a method as well.
    return spec.children() if hasattr(spec, "children") else spec.children_specs


def is_plain_model_output(kind: Any) -> bool:
    """Return whether a class is one of transformers' outputs and makes its objects as they all
    do."""
    if not (isinstance(kind, type) and issubclass(kind, OrderedDict)):
        return False
    if not dataclasses.is_dataclass(kind) or kind.__new__ is not OrderedDict.__new__:
        return False
    as_all = ("__post_init__", "__setattr__", "__setitem__")
    if any(getattr(getattr(kind, n, None), "__module__", "") != MODEL_OUTPUTS for n in as_all):
        return False
    code = getattr(kind.__init__, "__code__", None)
    return code is not None and code.co_filename == "<string>"  # the dataclass's own


def _learn_model_output(made: Any, parts: Sequence[Any], children: Sequence[Build]) -> Build | None:
    """Return what makes another object like `made`, which was made of these parts.

    None where it holds anything but its parts and None, or two parts cannot be told apart.
    """
    place = {id(part): k for k, part in enumerate(parts)}
    fields = [(name, value) for name, value in vars(made).items() if value is not None]
    items = [(key, place.get(id(value))) for key, value in OrderedDict.items(made)]
    known = all(id(value) in place for _, value in fields) and None not in dict(items).values()
    if not known or len(place) != len(parts):
        return None
    attributes = [(name, children[place[id(value)]]) for name, value in fields]
    entries = [(key, children[k]) for key, k in items if k is not None]
    kind: Any = type(made)
    empty, put = dict.fromkeys(vars(made)), OrderedDict.__setitem__

    def build(given: Sequence[Any]) -> Any:
        other = kind.__new__(kind)
        values = other.__dict__
        values.update(empty)
        for name, child in attributes:
            values[name] = child(given)
        for key, child in entries:
            put(other, key, values[key] if key in values else child(given))
        return other

    return build
