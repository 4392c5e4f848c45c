"""Tensor attributes: finds which attributes that a user has set on tensors the traced code reads.

In: the model's code, traced on stand-ins for tensors, which have none of a user's attributes. Out:
the names that it asked for in vain. Where one of the model's tensors or of the call's has such an
attribute, the capture is refused by name; where none has, that is a guard::

    with watch_attributes() as sought:  ...  getattr(self.weight, "scale", 1.0)
    sought  ->  {"scale"}
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from turbotx.capture.module_state.places import ItemPlace
from turbotx.capture.module_state.values import is_library
from turbotx.errors import CaptureError


@contextmanager
def watch_attributes() -> Iterator[set[str]]:
    """Context manager: note what the user's code in this thread asks of tensors that lack it."""
    sought, thread = set[str](), threading.get_ident()

    def __getattr__(self: Any, name: str) -> Any:
        asker = sys._getframe(1).f_globals.get("__name__")
        if threading.get_ident() == thread and not name.startswith("__") and not is_library(asker):
            sought.add(name)
        raise AttributeError(f"'Tensor' object has no attribute {name!r}")

    with patch.object(FakeTensor, "__getattr__", __getattr__, create=True):
        yield sought


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
