"""Replaced calls: calls of the model that PyTorch would not trace as they are, as ops that it does.

In: x[:, i], x.select(1, i) and x.narrow(1, i, n) whose i is a 0-d tensor; x.data; `grouped_mm` of
any dtype and width that eager mode accepts. Out: an op that reads i when the program runs, where
PyTorch would read the number while tracing; turbotx's op, since PyTorch's fake kernel accepts only
bfloat16 with rows of multiples of 16 bytes::

    x[:, i]                       ->  x.index_select(1, i.reshape(1))[:, 0]
    x[:, i] = y                   ->  x[:, i.reshape(1)] = y[:, None]
    grouped_mm(x, w, offs=ends)   ->  torch.ops.turbotx.grouped_mm(x, w, ends)

Where eager mode returns a view, the op returns a copy. Code that writes to one in place and reads
the other afterwards is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from turbotx.errors import CaptureError
from turbotx.ir import expert_ops
from turbotx.ir.memory_order import memory_of

assert expert_ops  # imported because it registers the op
Tensor: Any = torch.Tensor
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The public function, and the private op that it calls.
_GROUPED = ((torch, "_grouped_mm"), (torch.nn.functional, "grouped_mm"))

_GET_DATA, _SET_DATA = Tensor.data.__get__, Tensor.data.__set__
_PACKS = (
    "it packs sequences by their lengths (torch.nn.utils.rnn), so that sizes depend on values of "
    "tensors: run the layer over the padded sequences, or pack outside of the optimized module"
)
_REFUSED: dict[Any, str] = {
    torch._VF._pack_padded_sequence: _PACKS,
    torch._VF._pad_packed_sequence: _PACKS,
    _SET_DATA: "it sets the .data of a tensor, which a program cannot do: make a new tensor, or "
    "write into it by copy_",
}


@dataclass(eq=False)
class _Part:
    """A copy of a part of a tensor, where eager mode has a view.

    index: at which it was taken. versions: of the whole and of the part, as they were then. stale:
    which of the two was not written to since then.
    """

    whole: torch.Tensor
    part: torch.Tensor
    index: Any
    versions: tuple[int, int]
    stale: torch.Tensor | None = None

    def look(self) -> None:
        """Note whether one of the two was written to."""
        if self.stale is None and (now := _versions(self.whole, self.part)) != self.versions:
            self.stale = self.whole if now[1] != self.versions[1] else self.part

    def is_put_back(self, whole: Any, index: Any, value: Any) -> bool:
        """Return whether `whole[index] = value` puts the part in its place, as x[:, i] += 1
        does."""
        return whole is self.whole and index is self.index and value is self.part

    def renew(self) -> None:
        """Note that both are equal again."""
        self.versions, self.stale = _versions(self.whole, self.part), None


class ReplacedCalls(TorchFunctionMode):
    """While active, around the model only, replaces such calls."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[_Part] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _REFUSED:
            raise CaptureError(_REFUSED[func])
        if func == _GET_DATA:
            return args[0].detach()
        if func is not None and any(func is getattr(m, name, None) for m, name in _GROUPED):
            names = ("mat_a", "mat_b", "offs", "bias", "out_dtype")
            given = dict(zip(names, args, strict=False)) | kwargs
            if _is_plain(given):
                return torch.ops.turbotx.grouped_mm(given["mat_a"], given["mat_b"], given["offs"])
        writes = func is Tensor.__setitem__
        back = [p for p in self._parts if writes and p.is_put_back(*args)]
        if self._parts:
            self._check(pytree.tree_leaves((args, kwargs)), back)
        if writes and _write(*args):
            for part in self._parts:
                part.look()
            for part in back:
                part.renew()
            return None
        found = _take_at_tensors(func, args, kwargs)
        if found is not NotImplemented:
            self._note(found, args, kwargs)
            return found
        result = func(*args, **kwargs)
        for part in self._parts:
            part.look()
        return result

    def _check(self, used: Iterable[Any], without: Sequence[_Part] = ()) -> None:
        """Raise CaptureError if one of the values is a tensor, or a view of one, that a write to a
        part, or to what it is a part of, would have changed in eager mode."""
        parts = [p for p in self._parts if p not in without]
        stale = {memory_of(p.stale) for p in parts if p.stale is not None}
        if stale and any(isinstance(x, torch.Tensor) and memory_of(x) in stale for x in used):
            raise CaptureError(
                "its code takes a part of a tensor at an index that is a tensor, as x[:, i], then "
                "writes to the part or to x in place, and uses the other one, which a trace does "
                "not see changed: make a new x, as by x.index_copy(1, i.reshape(1), values), and "
                "take the part anew after a write"
            )

    def finish(self, results: Iterable[Any]) -> None:
        """Raise CaptureError if a result, or what a written part belongs to, lacks a write."""
        self._check([*results, *(p.whole for p in self._parts if p.stale is p.whole)])

    def _note(self, part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember a part that eager mode would return as a view."""
        whole = kwargs["input"] if "input" in kwargs else args[0]
        index = args[1] if len(args) > 1 else None
        if _is_view(index) and memory_of(part) != memory_of(whole):
            self._parts.append(_Part(whole, part, index, _versions(whole, part)))


def _versions(whole: torch.Tensor, part: torch.Tensor) -> tuple[int, int]:
    with torch._C.DisableTorchFunction():
        return whole._version, part._version


def _is_view(index: Any) -> bool:
    """Return whether eager mode returns a view at an index: one without lists and masks."""
    parts = index if isinstance(index, tuple) else (index,)
    plain = (int, torch.SymInt, slice, type(None), type(Ellipsis))
    numbers = [p for p in parts if not isinstance(p, plain)]
    return not any(isinstance(p, bool) for p in parts) and all(
        isinstance(p, torch.Tensor) and not p.dim() and p.dtype is not torch.bool for p in numbers
    )


def _is_plain(given: dict[str, Any]) -> bool:
    """Return whether a call multiplies rows by their experts' weights and does nothing else; calls
    that PyTorch refuses are left to it."""
    tensors: list[Any] = [given.get(name) for name in ("mat_a", "mat_b", "offs")]
    if not all(isinstance(t, torch.Tensor) for t in tensors):
        return False
    x, weight, ends = tensors
    if given.get("bias") is not None or given.get("out_dtype") not in (None, x.dtype):
        return False
    if (x.dim(), weight.dim(), ends.dim(), ends.dtype) != (2, 3, 1, torch.int32):
        return False
    fits = x.shape[1] == weight.shape[1] and ends.shape[0] == weight.shape[0]
    return bool(fits and x.dtype == weight.dtype and x.dtype in _DTYPES)


def _take_at_tensors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the result of a call, or NotImplemented if no tensor is used as a single index in
    it."""
    if func is Tensor.__getitem__:
        return _index(*args)
    selects = func in (Tensor.select, torch.select)
    if selects or func in (Tensor.narrow, torch.narrow):
        names = ("self", "dim", "index" if selects else "start", "length")
        given = dict(zip(names, args, strict=False)) | kwargs
        place, whole = given.get(names[2]), given.get("input", given.get("self"))
        if is_place(place):
            taken = _take(whole, given["dim"], place, 1 if selects else given["length"])
            return taken.select(given["dim"], 0) if selects else taken
    return NotImplemented


def is_place(value: Any) -> bool:
    """Return whether a tensor holds one integer that is unknown while tracing."""
    return (
        isinstance(value, FakeTensor)
        and value.dim() == 0
        and value.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
        and value.item_memo is None
        and value.constant is None
    )


def _as_size(part: Any) -> Any:
    """Return the size that a tensor is known to hold: PyTorch 2.11 would read it again."""
    memo = part.item_memo if isinstance(part, FakeTensor) and not part.shape else None
    return memo if isinstance(memo, torch.SymInt) else part


def _index(tensor: Any, index: Any) -> Any:
    found = _find_places(tensor, index)
    if found is None:
        return NotImplemented
    parts, places = found
    for d, place in places:
        tensor = _take(tensor, d, place)
    return tensor[parts]


def _write(tensor: Any, index: Any, value: Any) -> bool:
    """Write to a tensor at an index; return False if no tensor is a single index in it."""
    found = _find_places(tensor, index)
    if found is None:
        return False
    parts, places = found
    taken = [tensor]
    for d, place in places:
        taken.append(_take(taken[-1], d, place))
    taken[-1][parts] = value
    for (d, place), inner, outer in zip(places[::-1], taken[:0:-1], taken[-2::-1], strict=True):
        outer[(*[slice(None)] * d, _from_start(outer, d, place))] = inner
    return True


def _find_places(tensor: Any, index: Any) -> tuple[tuple[Any, ...], list[tuple[int, Any]]] | None:
    """Return an index with 0 for each tensor that is a single index, and the dims and tensors of
    these; None if there are none."""
    given = list(index) if isinstance(index, tuple) else [index]
    parts = list(map(_as_size, given))
    sized = any(p is not q for p, q in zip(parts, given, strict=True))
    if not (sized or any(map(is_place, parts))) or not isinstance(tensor, torch.Tensor):
        return None
    count, places = sum(_dims_of(p) for p in parts), []
    d = 0
    for k, part in enumerate(parts):
        if part is Ellipsis:
            d += tensor.dim() - count
        elif is_place(part):
            places.append((d, part))
            parts[k] = 0
        d += _dims_of(part)
    return tuple(parts), places


def _dims_of(part: Any) -> int:
    """Return the number of the tensor's dims that a part of an index consumes."""
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    if isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8) and part.dim():
        return part.dim()
    return 1


def _take(tensor: Any, d: int, place: Any, count: Any = 1) -> Any:
    """Return `count` elements along dim `d` from `place` on, which may be negative."""
    place = _from_start(tensor, d, place)
    if not (isinstance(count, int) and count == 1):
        place = place + torch.arange(count, device=place.device)
    return tensor.index_select(d, place)


def _from_start(tensor: Any, d: int, place: Any) -> Any:
    """Return a place along dim `d`, which may be negative, as an int64 tensor (1,)."""
    return torch.where(place < 0, place + tensor.shape[d], place).to(torch.int64).reshape(1)
