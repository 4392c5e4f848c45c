"""Tensor attributes: finds what the traced code reads and sets of a user's attributes on tensors.

In: the model's code, traced on stand-ins for tensors, which have none of a user's attributes. Out:
the names that it asked for in vain. Where one of the model's tensors or of the call's has such an
attribute, the capture is refused by name; where none has, that is a guard. What it sets on a tensor
that outlives the call is refused by name::

    with watch_attributes() as attributes:  ...  getattr(self.weight, "scale", 1.0)
    attributes.sought  ->  {"scale"}
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from turbotx.capture.module_state.places import ItemPlace
from turbotx.capture.module_state.values import is_library
from turbotx.errors import CaptureError


@dataclass
class TensorAttributes:
    """sought: the names that the code asked for in vain. written: the tensors on which it set one,
    with its name."""

    sought: set[str] = field(default_factory=set)
    written: list[tuple[torch.Tensor, str]] = field(default_factory=list)

    def refuse_lost(self, kept: Iterable[Any]) -> None:
        """Raise CaptureError if the code has set an attribute of one of the tensors that outlive
        the call: a program makes others."""
        ids = {id(x) for x in kept}
        for tensor, name in self.written:
            if id(tensor) in ids:
                raise _sets_attribute(name)


def _sets_attribute(name: str) -> CaptureError:
    return CaptureError(
        f"its code sets {name!r} of a tensor that is there after the call, and no program sets the "
        "attributes of tensors: return the value, or keep it in an attribute of the module"
    )


@contextmanager
def watch_attributes() -> Iterator[TensorAttributes]:
    """Context manager: note what the user's code in this thread asks of tensors that lack it, and
    what it sets. Raises CaptureError in that code where it sets an attribute of a real tensor."""
    found, thread = TensorAttributes(), threading.get_ident()

    def is_users() -> bool:
        asker = sys._getframe(2).f_globals.get("__name__")
        return threading.get_ident() == thread and not is_library(asker)

    def __getattr__(self: Any, name: str) -> Any:
        if not name.startswith("__") and is_users():
            found.sought.add(name)
        raise AttributeError(f"'Tensor' object has no attribute {name!r}")

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if not hasattr(torch.Tensor, name) and is_users():
            if not isinstance(self, FakeTensor):  # of a global or a closure
                raise _sets_attribute(name)
            found.written.append((self, name))
        object.__setattr__(self, name, value)

    with (
        patch.object(FakeTensor, "__getattr__", __getattr__, create=True),
        patch.object(torch.Tensor, "__setattr__", __setattr__),
    ):
        yield found


def have_attributes(names: Collection[str], tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether one of the tensors has an attribute of one of these names."""
    return any(name in vars(tensor) for name in names for tensor in tensors)


def find_attributes(
    sought: Collection[str], model: nn.Module, names: Sequence[str],
    tensors: Sequence[torch.Tensor],
) -> dict[Any, ItemPlace]:  # fmt: skip
    """Return the places by key at which parameters and buffers would have what was sought.

    names, tensors: of the call. Raises CaptureError, naming the tensor, if one has it.
    """
    if not sought:
        return {}
    own = list(itertools.chain(model.named_parameters(), model.named_buffers()))
    for text, tensor in (*own, *zip(names, tensors, strict=True)):
        for name in sought:
            if name in vars(tensor):
                raise CaptureError(
                    f"cannot capture {type(model).__name__}: its code reads {name!r} of the tensor "
                    f"{text!r}, and no program sees the attributes of tensors: keep it in an "
                    "attribute of the module, or pass it as an argument"
                )
    places = (ItemPlace(vars(t), name, f"{text}.{name}") for text, t in own for name in sought)
    return {place.key: place for place in places}
