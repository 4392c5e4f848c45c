"""Weights: what a program derives from the module's own parameters, kept fresh.

In: the parameters, by the module that owns them, and the prepared constants' graph. Out: current
tensors and packed GEMM weights; a parameter that was updated in place, replaced or loaded anew
is noticed by its version, identity and address, and what derives from it is made again::

    weights.refresh()  ->  True when anything changed since the last call
"""

from __future__ import annotations

import ctypes
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch
from torch import fx, nn

from turbotx.runtime.tensor_watch import Watch, make_watch

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Window(Protocol):
    """A part of a weight, by sizes that are numbers."""

    @property
    def tensor(self) -> str: ...
    @property
    def shape(self) -> Sequence[Any]: ...
    @property
    def strides(self) -> Sequence[Any]: ...
    @property
    def offset(self) -> Any: ...


class PackedWeight:
    """A GEMM weight in the native library's layout; freed with the object."""

    def __init__(self, native: Any, weight: torch.Tensor, gated: bool = False) -> None:
        self._native = native
        n, k = weight.shape
        self.address = native.ttx_pack_weight(
            DTYPE_CODES[weight.dtype], weight.data_ptr(), n, k, *weight.stride(), gated
        )
        if not self.address:
            raise MemoryError(f"no memory to pack a weight of {weight.nbytes} bytes")

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self._native.ttx_free_weight(self.address)


class Weights:
    """Parameters, prepared constants and packed weights of one program."""

    def __init__(
        self, model: nn.Module, constants: Mapping[str, torch.Tensor],
        targets: Mapping[str, str], prepared: Mapping[str, fx.Node],
    ) -> None:  # fmt: skip
        """targets: program tensor name -> dotted path in the user's module."""
        self.paths = targets
        self._model = model
        self._constants = constants
        self.prepared = prepared
        self._slots = {name: self._find(path) for name, path in targets.items()}
        self._owners = [owner for owner, _ in self._slots.values()]
        self._leaves = [leaf for _, leaf in self._slots.values()]
        self._watched: tuple[list[Any], Watch] | None = None
        self.native: ctypes.CDLL | None = None
        self.later: Future[ctypes.CDLL | None] | None = None
        self.settle: Callable[[], object] = lambda: None
        """Waits until what was queued for derived weights is done, where a device queues it."""
        self.tensors: dict[str, torch.Tensor] = {}
        self.version = 0
        self._lock = threading.Lock()

    def _find(self, path: str) -> tuple[Mapping[str, torch.Tensor | None], str]:
        """Return the dictionary that holds a parameter now, so that a replaced one is seen."""
        if path.startswith("constants."):
            return self._constants, path.removeprefix("constants.")
        *parents, leaf = path.split(".")
        module = self._model.get_submodule(".".join(parents))
        for table in (module._parameters, module._buffers):
            if leaf in table:
                return table, leaf
        return module.__dict__, leaf

    def owned(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Give every parameter, buffer and constant as it is now, by its path."""
        for path, (owner, leaf) in zip(self.paths.values(), self._slots.values(), strict=True):
            yield path, owner[leaf]  # type: ignore[misc]

    def refresh(self) -> bool:
        """Look at every parameter; derive again what changed. Returns whether anything did."""
        if not self.is_stale():
            if self.later is not None and self.later.done():
                self._watch_natively(self.later.result())
            return False
        # Whoever comes while another thread derives waits for it, rather than run on what was.
        with self._lock:
            if not self.is_stale():
                return False
            watched = self._new_watch()  # first, so that it sees what changes from now on
            tensors: dict[str, Any] = {n: owner[leaf] for n, (owner, leaf) in self._slots.items()}
            with torch.no_grad():
                for name, node in self.prepared.items():
                    tensors[name] = _compute(node, tensors)
            if self.prepared:
                self.settle()
            self.tensors = tensors
            self.version += 1
            self._watched = watched
        return True

    def _new_watch(self) -> tuple[list[Any], Watch]:
        """Watch the parameters as they are, natively where the library is there for it."""
        tensors = self._owned()
        return tensors, make_watch(self.native, tensors)

    def _watch_natively(self, native: ctypes.CDLL | None) -> None:
        """Go on with a library that was built meanwhile."""
        with self._lock:
            self.native, self.later, before = native, None, self._watched
            watched = self._new_watch()
            if before is not None and not self._have_changed(*before):
                self._watched = watched  # what it takes for unchanged is what was seen before

    def _have_changed(self, tensors: list[Any], watch: Watch) -> bool:
        """Tell whether the module holds other tensors than these, or these were changed."""
        now = map(operator.getitem, self._owners, self._leaves)
        return not all(map(operator.is_, now, tensors)) or watch.changed()

    def _owned(self) -> list[Any]:
        return list(map(operator.getitem, self._owners, self._leaves))

    def is_stale(self) -> bool:
        """Tell whether `refresh` would derive anything again."""
        return self._watched is None or self._have_changed(*self._watched)

    def window(self, operand: Window) -> torch.Tensor:
        """Return an operand on a parameter or prepared constant as a tensor."""
        base = self.tensors[operand.tensor]
        shape = [int(e) for e in operand.shape]
        strides = [int(s) for s in operand.strides]
        return base.as_strided(shape, strides, base.storage_offset() + int(operand.offset))


def _compute(node: fx.Node, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Run a prepared constant's calls on the parameters as they are now."""
    if node.name in tensors:
        return tensors[node.name]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _compute(n, tensors))
    made: Any = node.target(*args, **kwargs)  # type: ignore[operator]
    return made.contiguous() if isinstance(made, torch.Tensor) else made  # a split is a list
