"""Weights: a module's parameters, with packed weights and constants recomputed when they change.

In: the parameters, through the modules that own them, and the graph of hoisted constants. Out:
current tensors and packed GEMM weights. A parameter that was updated in place, replaced or reloaded
is detected by version, identity, address and layout; one written through `.data` by a sample of its
elements. Whatever was derived from it is then recomputed::

    weights.refresh()  ->  True if anything changed since the last call
"""

from __future__ import annotations

import ctypes
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from turbotx.capture.torchao_weights import (
    floats_of,
    is_torchao,
    join_integers,
    parts_of,
    scheme_of,
)
from turbotx.errors import ModelChangedError, WeightsReleasedError
from turbotx.ir.memory_order import has_version
from turbotx.program.executable import Packing, WeightWindow
from turbotx.runtime.packed_parameter import PackedParameter, restoring
from turbotx.runtime.packed_sources import packed_before
from turbotx.runtime.packed_weight import PackedWeight
from turbotx.runtime.slot_watch import Slot, SlotWatch
from turbotx.runtime.tensor_watch import Watch, make_watch

log = logging.getLogger("turbotx.memory")


Place = tuple[dict[str, Any], str]
"""A dict that holds a parameter, and its key."""


@dataclass(frozen=True)
class Kind:
    """The properties of a parameter that a program was compiled for."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Kind:
        """Return dtype, shape, strides and device of a tensor."""
        shape, strides = map(int, tensor.shape), map(int, tensor.stride())
        return cls(tensor.dtype, tuple(shape), tuple(strides), tensor.device)

    def misfit(self, tensor: Any) -> str:
        """Return how a tensor differs from this kind, "" if it matches."""
        if not isinstance(tensor, torch.Tensor):
            return "it is gone" if tensor is None else f"it is a {type(tensor).__name__}"
        foreign = is_traceable_wrapper_subclass(tensor) and scheme_of(tensor) is None
        if tensor.layout is not torch.strided or foreign:
            return f"it is a {type(tensor).__name__} of {tensor.layout}"
        if tensor.dtype != self.dtype:
            return f"it is {tensor.dtype}, not {self.dtype}"
        if tensor.shape != self.shape:
            return f"its shape is {tuple(tensor.shape)}, not {self.shape}"
        by_dim = zip(self.shape, tensor.stride(), self.strides, strict=True)
        if any(now != then for size, now, then in by_dim if size > 1):
            return f"its strides are {tensor.stride()}, not {self.strides}"
        # A number may stay on the CPU for a call on a GPU, and is copied there.
        carried = self.device.type != "cpu" and tensor.numel() == 1
        if tensor.device != self.device and not carried:
            return f"it is on {tensor.device}, not {self.device}"
        if tensor.is_conj() or tensor.is_neg():
            return "it is stored conjugated or negated"
        return "" if has_version(tensor) else "it has no version"


class Weights:
    """Parameters, hoisted constants and packed weights of one program."""

    def __init__(
        self, model: nn.Module, constants: Mapping[str, torch.Tensor],
        targets: Mapping[str, str], hoisted: Mapping[str, fx.Node], kinds: Mapping[str, Kind],
        copies: Mapping[str, Place] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        """targets: program tensor name -> dotted path in the user's module. kinds: by that name,
        the properties it was compiled for. copies: other places that hold a parameter, such as the
        captured graph."""
        self.paths, self.kinds = targets, kinds
        self._model = model
        self._constants = constants
        self.hoisted = hoisted
        self._copies = copies
        self._slots = {name: self._find(path) for name, path in targets.items()}
        self.watched: tuple[SlotWatch, Watch] | None = None
        self.native: ctypes.CDLL | None = None
        self.later: Future[ctypes.CDLL | None] | None = None
        self.settle: Callable[[], object] = lambda: None
        """Waits until queued computations of derived weights are done, on a GPU."""
        self.packed: frozenset[str] = frozenset()
        """The tensors that the runtime copies into packed weights."""
        self.quantized: Sequence[Packing] = ()
        """Packings of int8 weights that quantise whole parameters."""
        self.read: Collection[str] = {*targets, *hoisted}
        """The tensors that are read unpacked. Constants that are neither read nor packed are
        computed on access, for example by a replay."""
        self.tensors: dict[str, torch.Tensor] = {}
        self.version = 0
        self._lock = threading.Lock()

    def _find(self, path: str) -> Slot:
        """Return the dict that holds a parameter, so that replacing it is detected."""
        if path.startswith("constants."):
            return self._constants, path.removeprefix("constants.")
        *parents, leaf = path.split(".")
        module = self._model.get_submodule(".".join(parents))
        for table in (module._parameters, module._buffers):
            if leaf in table:
                return table, leaf
        return module.__dict__, leaf

    def owned(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every parameter, buffer and constant in its current state, by path."""
        for path, (owner, leaf) in zip(self.paths.values(), self._slots.values(), strict=True):
            tensor = owner[leaf]
            assert tensor is not None, f"{path} is gone"
            yield path, tensor

    def misfit(self) -> str:
        """Return which parameter the program was not compiled for, and why; "" if all match."""
        for name, (owner, leaf) in self._slots.items():
            if leaf not in owner:
                return f"{self.paths[name]!r} is gone"
            why = self.kinds[name].misfit(owner[leaf])
            if why:
                return f"{self.paths[name]!r} is another than was compiled for: {why}"
        return ""

    def forget(self) -> None:
        """Recompute everything at the next call, even if no change is detected."""
        with self._lock:
            self.watched = None

    def refresh(self) -> bool:
        """Check all parameters; recompute what depends on changed ones. Returns whether any
        changed.

        Raises ModelChangedError if one has another dtype, shape, layout or device than the program
        was compiled for.
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
            watched = self._new_watch()  # started first, so that it detects later changes
            tensors = _Tensors(self.hoisted, self.quantized)
            tensors.update((n, owner[leaf]) for n, (owner, leaf) in self._slots.items())
            plainly, floats = self.read_plainly(), self.read_plainly(integers=False)
            for name, own in [*tensors.items()]:
                if name in (floats if is_torchao(own) else plainly):
                    tensors[name] = _floats_of(own)
            with torch.no_grad():
                held = tensors.put_scales()
                for name, node in self.hoisted.items():
                    if (name in self.read or name in self.packed) and name not in held:
                        tensors[name] = compute_constant(node, tensors)
            if self.hoisted:
                self.settle()
            self.tensors = tensors
            self.version += 1
            self.watched = watched
        return True

    def drop_packed(self) -> None:
        """Free packed integers, for int4 the scales too; they are recomputed on access."""
        for packing in self.quantized:
            for name in (packing.parts[0].tensor, packing.scale if packing.group else ""):
                if name not in self.read:
                    self.tensors.pop(name, None)

    def _new_watch(self) -> tuple[SlotWatch, Watch]:
        """Return watches over which parameters there are, and over their current state."""
        slots, copied = SlotWatch(self.native, [*self._slots.values()]), self._computed_with()
        copied |= self.packed
        here = [
            (part, name in copied)
            for tensor, name in zip(slots.tensors, self._slots, strict=True)
            if not isinstance(tensor, PackedParameter)  # nothing can write to it
            for part in (parts_of(tensor) if is_torchao(tensor) else (tensor,))
        ]
        return slots, make_watch(self.native, [t for t, _ in here], [c for _, c in here])

    def _computed_with(self, but: Collection[str] = ()) -> set[str]:
        """Return the parameters that hoisted constants are computed from. but: constants to
        skip."""
        found: set[str] = set()
        left = [n for name, n in self.hoisted.items() if name in self.read or name in self.packed]
        while left:
            node = left.pop()
            if node.name in but:
                continue
            found.add(node.name)
            left += () if node.name in self._slots else node.all_input_nodes
        return found

    def read_plainly(self, integers: bool = True) -> set[str]:
        """Return the tensors that a run or a hoisted constant reads unpacked. Weights of integers
        and their scales do not count, which are computed once; integers: but where a run reads
        them."""
        made = {p.parts[0].tensor for p in self.quantized} - {*(self.read if integers else ())}
        return self._computed_with(made | {p.scale for p in self.quantized}) | {*self.read}

    # --- weights kept in packed form only ---

    def release(self, sources: Mapping[str, tuple[PackedWeight, int, bool]]) -> None:
        """Replace parameters by their packed form and free their memory, unless something else
        holds them.

        sources: by name, the packed weight, the first row in it, and whether the rows are the
        parameter's columns.
        """
        plainly = self.read_plainly()
        with restoring, self._lock:
            if self.is_stale():
                return  # the next call packs and releases the new values
            self.watched = None  # its handles hold the tensors too
            gc.collect()  # reference cycles left by traces hold some
            for name, (table, key) in self._copies.items():
                if isinstance(self.tensors[name], PackedParameter):
                    table[key] = self.tensors[name]  # the trace was given a plain one
            stay = {id(self.tensors[n]) for n in plainly if n in self._slots}
            kept = [
                self.paths[name]
                for name, source in sources.items()
                if name in self._slots
                and id(self.tensors[name]) not in stay
                and not self._release(name, *source)
            ]
            self.watched = self._new_watch()
        if kept:
            log.warning(
                "keep_weights=False keeps %d weights, which something else holds too: %s",
                len(kept), ", ".join(kept),
            )  # fmt: skip

    def _release(self, name: str, weight: PackedWeight, first: int, transposed: bool) -> bool:
        """Replace a plain parameter by a packed one; return False if something else holds it."""
        owner, leaf = self._slots[name]
        parameter = owner[leaf]
        if type(parameter) is not nn.Parameter or _is_shared(parameter):
            return isinstance(parameter, PackedParameter)
        places: list[Place] = [
            (m._parameters, key)
            for m in self._model.modules()
            for key, held in m._parameters.items()
            if held is parameter
        ]
        names = [n for n, tensor in self.tensors.items() if tensor is parameter]
        packed: Any = PackedParameter(parameter, weight, first, transposed, self.paths[name])
        self._put(packed, places, names)
        left = weakref.ref(parameter)
        del parameter
        held = left()
        if held is not None:
            self._put(held, places, names)
        return held is None

    def _put(self, tensor: torch.Tensor, places: Sequence[Place], names: Sequence[str]) -> None:
        for table, key in places:
            table[key] = tensor
        for name in names:
            self.tensors[name] = tensor
            table, key = self._copies.get(name, (self.tensors, name))
            table[key] = tensor

    def _watch_natively(self, native: ctypes.CDLL | None) -> None:
        """Switch to the native library, once it is built."""
        with self._lock:
            self.native, self.later, before = native, None, self.watched
            watched = self._new_watch()
            if before is not None and not _have_changed(before):
                self.watched = watched  # the state it starts from is the one seen before

    def is_stale(self) -> bool:
        """Return whether `refresh` would recompute anything."""
        watched = self.watched
        return watched is None or _have_changed(watched)

    def window(self, part: WeightWindow) -> torch.Tensor:
        """Return a part of a parameter or hoisted constant as a tensor."""
        base = _floats_of(self.tensors[part.tensor])
        return base.as_strided(part.shape, part.strides, base.storage_offset() + part.offset)


def _have_changed(watched: tuple[SlotWatch, Watch]) -> bool:
    """Return whether the module holds other tensors, or these were changed."""
    return any(watch.changed() for watch in watched)


def _floats_of(parameter: Any) -> torch.Tensor:
    """Return a tensor, or the float elements of a released parameter or of torchao's; refuse if
    they were replaced by int8 ones, since a program that reads floats would compute otherwise."""
    if not isinstance(parameter, PackedParameter):
        return floats_of(parameter) if is_torchao(parameter) else parameter
    if parameter.weight.scale is None:
        return parameter.unpacked()
    raise _given_up(parameter, "as floats")


def _given_up(parameter: Any, how: str) -> WeightsReleasedError:
    what = f"a call reads {parameter.path!r} {how}, and its floats were given up for integers"
    hint = "optimize the model with keep_weights=True"
    return WeightsReleasedError(f"{what} (keep_weights=False): {hint}")


def _is_shared(tensor: torch.Tensor) -> bool:
    """Return whether other tensors share a tensor's storage, such as those of a state dict."""
    count = getattr(torch._C, "_storage_Use_Count", None)  # private; without it nothing is known
    # One reference from the tensor, one from this query.
    return count is None or count(tensor.untyped_storage()._cdata) > 2


class _Tensors(dict[str, Any]):
    """Tensors by name; hoisted constants that are not kept are computed on access."""

    def __init__(self, hoisted: Mapping[str, fx.Node], quantized: Sequence[Packing]) -> None:
        super().__init__()
        self._hoisted = hoisted
        self._quantized = {packing.parts[0].tensor: packing for packing in quantized}
        self._scales = {packing.scale: packing for packing in quantized}

    def __missing__(self, name: str) -> torch.Tensor:
        with torch.no_grad():
            packing = self._quantized.get(name) or self._scales.get(name)
            if packing is None:
                return compute_constant(self._hoisted[name], self)
            before = packed_before(packing, self)
            if before is None or before.scale is None:
                return self._made(packing)[name == packing.scale]
            return before.scale if name == packing.scale else before.rows(0, before.count)

    def put_scales(self) -> set[str]:
        """Add the scales of int8 weights; return the names of weights that are packed already."""
        held: set[str] = set()
        for name, packing in self._quantized.items():
            before = packed_before(packing, self)
            if before is not None and before.scale is not None:
                self[packing.scale] = before.scale
                held.add(name)
            else:
                self[name], self[packing.scale] = self._made(packing)
        return held

    def _made(self, packing: Packing) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a weight's integers and scales: torchao's, or those of its parameters."""
        given = join_integers([self[part.tensor] for part in packing.sources])
        if given is not None:
            return given.numbers, given.scale
        wide, node = dict(self), self._hoisted[packing.parts[0].tensor]
        for name in (part.tensor for part in packing.sources):
            own = wide[name]
            if isinstance(own, PackedParameter):
                if own.weight.scale is not None and own.weight.group != packing.group:
                    raise _given_up(own, "quantised otherwise")
                wide[name] = own.unpacked(torch.float32)
        wide[packing.scale] = compute_constant(node.args[1], wide)
        return compute_constant(node, wide), wide[packing.scale]


def compute_constant(node: Any, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Compute a hoisted constant from the current parameters, on their device."""
    if node.name in tensors:
        return tensors[node.name]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: compute_constant(n, tensors))
    target: Any = node.target
    made: Any = target(*args, **kwargs)
    return made.contiguous() if isinstance(made, torch.Tensor) else made  # a split is a list
