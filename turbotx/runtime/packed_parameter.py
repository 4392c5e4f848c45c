"""Packed parameter: replaces a module's parameter whose values are kept in packed form only.

In: a packed weight, and the rows of it that hold the parameter. Out: an `nn.Parameter` without
storage, of the same shape, dtype and strides. Reads get a dense copy, writes raise an error::

    module.weight + 1          # unpacked for this one call
    module.weight.add_(1)      # WeightsReleasedError
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from turbotx.capture.torchao_weights import is_torchao, scheme_of, stand_in
from turbotx.errors import QuantizedWarning, WeightsReleasedError
from turbotx.runtime.packed_weight import PackedWeight

DEQUANTIZED = (
    "a state dict is made of a model whose float weights were given up for quantised ones "
    "(keep_weights=False, or a file of such): it has integers times scales in their place"
)
_OF_MEMORY = frozenset(
    {"data_ptr", "untyped_storage", "_typed_storage", "storage", "share_memory_", "set_",
     "resize_", "__dlpack__", "__array__", "numpy", "pin_memory", "is_pinned"}
)  # fmt: skip
"""Methods of a tensor that need its storage."""


class PackedParameter(nn.Parameter):
    """A parameter of which `weight` holds every element, as integers where it has scales: it is
    read dequantised then. first: its first row there; transposed: its rows are the columns of the
    parameter. path: what messages call it."""

    stands_for = nn.Parameter
    """The type that guards see."""
    weight: PackedWeight
    first: int
    transposed: bool
    path: str

    @staticmethod
    def __new__(
        cls, like: torch.Tensor, weight: PackedWeight, first: int, transposed: bool, path: str
    ) -> PackedParameter:
        """like: a tensor with its shape, strides and dtype; nothing of it is kept."""
        made: PackedParameter = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device,
            requires_grad=like.requires_grad,
        )  # fmt: skip
        made.weight, made.first, made.transposed, made.path = weight, first, transposed, path
        return made

    def __init__(self, *args: Any) -> None:
        pass

    def unpacked(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a dense copy with the parameter's shape and strides, in its dtype or the given
        one."""
        n, k = reversed(self.shape) if self.transposed else self.shape
        assert k == self.weight.inputs
        rows = self.weight.values(self.first, n)
        out = torch.empty_strided(self.shape, self.stride(), dtype=dtype or self.dtype)
        return out.copy_(rows.t() if self.transposed else rows)

    def refusal(self, what: str) -> WeightsReleasedError:
        """Return the error for an operation that a packed weight does not support."""
        return WeightsReleasedError(
            f"{what} of {self.path!r}: it is held in packed form only (keep_weights=False). "
            "Optimize the model with keep_weights=True to change it, or take its values from "
            "state_dict() of the optimized module"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse operations that need storage; return plain tensors for a state dict."""
        name = getattr(func, "__name__", "")
        own = args[0] if args and isinstance(args[0], cls) else None
        if own is not None and name in _OF_MEMORY:
            raise own.refusal(f"cannot give memory by {name}()")
        if own is not None and name == "__set__" and func.__self__.__name__ == "data":
            if args[1] is own:  # by `module.to` if nothing is converted
                return None
            raise own.refusal("cannot set .data")
        if own is not None and name == "detach" and _asks_module():
            if own.weight.scale is not None:
                warnings.warn(DEQUANTIZED, QuantizedWarning, stacklevel=2)
            return own.unpacked()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an op on dense copies; refuse ops that write to it."""
        return _run_on_copies(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """Return a plain parameter."""
        made = memo[id(self)] = nn.Parameter(self.unpacked(), self.requires_grad)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain parameter."""
        return nn.Parameter(self.unpacked(), self.requires_grad).__reduce_ex__(protocol)


class UnpackedView(torch.Tensor):
    """A view of a packed parameter's elements. It is a copy, so writes to it are refused."""

    plain: torch.Tensor
    of: PackedParameter

    @staticmethod
    def __new__(cls, plain: torch.Tensor, of: PackedParameter) -> UnpackedView:
        """plain: the elements. of: their parameter."""
        made = torch.Tensor._make_subclass(cls, plain)
        made.plain, made.of = plain, of
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an op on the elements; refuse ops that write to it."""
        return _run_on_copies(func, args, kwargs or {})


def _asks_module() -> bool:
    """Return whether the caller is nn.Module, for a state dict."""
    return sys._getframe(2).f_code.co_filename == inspect.getsourcefile(nn.Module)


def _run_on_copies(func: Any, args: Any, kwargs: Any) -> Any:
    """Run a PyTorch op on dense copies. Results that alias them refuse writes, as the parameter
    does, since they would be lost."""
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    whose: PackedParameter | None = None
    for argument in func._schema.arguments:
        for leaf in pytree.tree_leaves(named.get(argument.name)):
            if isinstance(leaf, (PackedParameter, UnpackedView)):
                whose = leaf if isinstance(leaf, PackedParameter) else leaf.of
                if argument.alias_info is not None and argument.alias_info.is_write:
                    raise whose.refusal(f"cannot write by {func}")
    args, kwargs = pytree.tree_map_only(PackedParameter, PackedParameter.unpacked, (args, kwargs))
    args, kwargs = pytree.tree_map_only(UnpackedView, lambda v: v.plain, (args, kwargs))
    made = func(*args, **kwargs)
    if whose is None or all(r.alias_info is None for r in func._schema.returns):
        return made
    return pytree.tree_map_only(torch.Tensor, lambda t: UnpackedView(t, whose), made)


restoring = threading.RLock()
"""Held while parameters are dense for a trace, so that none is released meanwhile."""


@contextlib.contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Replace packed parameters, and torchao's int8 ones, by plain ones inside the context, for
    tracing."""
    with restoring:
        packed: list[tuple[dict[str, Any], str, Any]] = [
            (m._parameters, name, p)
            for m in module.modules()
            for name, p in m._parameters.items()
            if isinstance(p, PackedParameter) or (is_torchao(p) and scheme_of(p) is not None)
        ]
        dense: dict[int, nn.Parameter] = {}
        for table, name, p in packed:
            if id(p) not in dense:
                released = isinstance(p, PackedParameter)
                made = nn.Parameter(p.unpacked(), p.requires_grad) if released else stand_in(p)
                dense[id(p)] = made
            table[name] = dense[id(p)]
        try:
            yield
        finally:
            for table, name, p in packed:
                if table.get(name) is dense[id(p)]:
                    table[name] = p
