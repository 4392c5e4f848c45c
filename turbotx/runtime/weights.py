"""Weights: packed weights and constants derived from a module's parameters, refreshed on change.

In: the parameters, by the module that owns them, and the prepared constants' graph. Out: current
tensors and packed GEMM weights; a parameter that was updated in place, replaced or loaded anew
is noticed by its version, identity, address and layout, one that was written through `.data` by
some of its elements, and what derives from it is made again::

    weights.refresh()  ->  True when anything changed since the last call
"""

from __future__ import annotations

import ctypes
import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from turbotx.errors import ModelChangedError
from turbotx.ir.matmul_kernels import DTYPE_CODES
from turbotx.program.executable import WeightWindow
from turbotx.runtime.tensor_watch import Watch, make_watch


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


@dataclass(frozen=True)
class Kind:
    """What a program takes for granted of a parameter: kernels are compiled for it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Kind:
        """Return dtype, sizes, strides and device of a tensor."""
        shape, strides = map(int, tensor.shape), map(int, tensor.stride())
        return cls(tensor.dtype, tuple(shape), tuple(strides), tensor.device)

    def misfit(self, tensor: Any) -> str:
        """Return what is other about a tensor, "" where it is of this kind."""
        if not isinstance(tensor, torch.Tensor):
            return "it is gone" if tensor is None else f"it is a {type(tensor).__name__}"
        if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
            return f"it is a {type(tensor).__name__} of {tensor.layout}"
        if tensor.dtype != self.dtype:
            return f"it is {tensor.dtype}, not {self.dtype}"
        if tensor.shape != self.shape:
            return f"its shape is {tuple(tensor.shape)}, not {self.shape}"
        by_dim = zip(self.shape, tensor.stride(), self.strides, strict=True)
        if any(now != then for size, now, then in by_dim if size > 1):
            return f"its strides are {tensor.stride()}, not {self.strides}"
        # A number may lie on the CPU beside a GPU, and is brought there.
        carried = self.device.type != "cpu" and tensor.numel() == 1
        if tensor.device != self.device and not carried:
            return f"it is on {tensor.device}, not {self.device}"
        if tensor.is_conj() or tensor.is_neg():
            return "it is stored conjugated or negated"
        return "it has no version" if tensor.is_inference() else ""


class Weights:
    """Parameters, prepared constants and packed weights of one program."""

    def __init__(
        self, model: nn.Module, constants: Mapping[str, torch.Tensor],
        targets: Mapping[str, str], prepared: Mapping[str, fx.Node], kinds: Mapping[str, Kind],
    ) -> None:  # fmt: skip
        """targets: program tensor name -> dotted path in the user's module. kinds: by the name too,
        what the program was compiled for."""
        self.paths, self.kinds = targets, kinds
        self._model = model
        self._constants = constants
        self.prepared = prepared
        self._slots = {name: self._find(path) for name, path in targets.items()}
        self._owners = [owner for owner, _ in self._slots.values()]
        self._leaves = [leaf for _, leaf in self._slots.values()]
        self.watched: tuple[list[Any], Watch] | None = None
        self.native: ctypes.CDLL | None = None
        self.later: Future[ctypes.CDLL | None] | None = None
        self.settle: Callable[[], object] = lambda: None
        """Waits until what was queued for derived weights is done, where a device queues it."""
        self.packed: frozenset[str] = frozenset()
        """The tensors of which the runtime keeps copies of its own."""
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
            tensor = owner[leaf]
            assert tensor is not None, f"{path} is gone"
            yield path, tensor

    def misfit(self) -> str:
        """Return which parameter is not what the program was compiled for, and why; "" if none."""
        for name, (owner, leaf) in self._slots.items():
            if leaf not in owner:
                return f"{self.paths[name]!r} is gone"
            why = self.kinds[name].misfit(owner[leaf])
            if why:
                return f"{self.paths[name]!r} is another than was compiled for: {why}"
        return ""

    def forget(self) -> None:
        """Derive everything again at the next call, whether or not a change is to be seen."""
        with self._lock:
            self.watched = None

    def refresh(self) -> bool:
        """Look at every parameter; derive again what changed. Returns whether anything did.

        Raises ModelChangedError where one is of another dtype, size, layout or device than the
        program was compiled for.
        """
        if not self.is_stale():
            if self.later is not None and self.later.done():
                self._watch_natively(self.later.result())
            return False
        # Concurrent callers block until the refresh ends, so that none uses stale weights.
        with self._lock:
            if not self.is_stale():
                return False
            changed = self.misfit()
            if changed:
                raise ModelChangedError(changed)
            watched = self._new_watch()  # first, so that it sees what changes from now on
            tensors: dict[str, Any] = {n: owner[leaf] for n, (owner, leaf) in self._slots.items()}
            with torch.no_grad():
                for name, node in self.prepared.items():
                    tensors[name] = compute_constant(node, tensors)
            if self.prepared:
                self.settle()
            self.tensors = tensors
            self.version += 1
            self.watched = watched
        return True

    def _new_watch(self) -> tuple[list[Any], Watch]:
        """Watch the parameters as they are, natively where the library is there for it."""
        tensors, read = self._owned(), self._read_ahead()
        return tensors, make_watch(self.native, tensors, [name in read for name in self._slots])

    def _read_ahead(self) -> set[str]:
        """Return the parameters of whose values a copy is kept, packed or computed with."""
        found: set[str] = set()
        left = [n for node in self.prepared.values() for n in node.all_input_nodes]
        while left:
            node = left.pop()
            found.add(node.name)
            left += () if node.name in self._slots else node.all_input_nodes
        return found | self.packed

    def _watch_natively(self, native: ctypes.CDLL | None) -> None:
        """Go on with a library that was built meanwhile."""
        with self._lock:
            self.native, self.later, before = native, None, self.watched
            watched = self._new_watch()
            if before is not None and not self._have_changed(*before):
                self.watched = watched  # what it takes for unchanged is what was seen before

    def _have_changed(self, tensors: list[Any], watch: Watch) -> bool:
        """Tell whether the module holds other tensors than these, or these were changed."""
        try:
            now = map(operator.getitem, self._owners, self._leaves)
            return not all(map(operator.is_, now, tensors)) or watch.changed()
        except KeyError:  # one was taken out
            return True

    def _owned(self) -> list[Any]:
        return list(map(operator.getitem, self._owners, self._leaves))

    def is_stale(self) -> bool:
        """Tell whether `refresh` would derive anything again."""
        return self.watched is None or self._have_changed(*self.watched)

    def window(self, part: WeightWindow) -> torch.Tensor:
        """Return a part of a parameter or prepared constant as a tensor."""
        base = self.tensors[part.tensor]
        return base.as_strided(part.shape, part.strides, base.storage_offset() + part.offset)


def compute_constant(node: fx.Node, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Run a prepared constant's calls on the parameters as they are now."""
    if node.name in tensors:
        return tensors[node.name]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: compute_constant(n, tensors))
    target: Any = node.target
    made: Any = target(*args, **kwargs)
    return made.contiguous() if isinstance(made, torch.Tensor) else made  # a split is a list
