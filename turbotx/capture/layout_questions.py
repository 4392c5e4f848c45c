"""Layout questions: detects that traced code queries an input's strides or contiguity.

In: the call's tensors and the model's code, traced while this mode is active. Out: the inputs whose
strides or contiguity, or those of a view, were queried, and the sizes on which the answers depend.
A trace sees dense inputs, so the program then accepts only dense ones; a dim of size 1 has any
stride in a dense tensor, so that where strides were queried, its stride must be the dense one too::

    with LayoutQuestions(note) as questions:  ...  if x.stride(1) == 8: ...
    questions.asked, questions.sizes  ->  {0: True}, {batch, seq}

`x.contiguous()` of an input stays an op of the graph. Access to an input's storage,
`x.untyped_storage()`, is refused, since it may hold more than the input; so is `x.requires_grad`,
but of the model's parameters, where the answer is a guard.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from turbotx.capture.module_state.values import caller_outside, is_users
from turbotx.errors import CaptureError
from turbotx.ir.expr import Expr, expr
from turbotx.ir.memory_order import memory_of

Tensor: Any = torch.Tensor
_QUESTIONS = frozenset(
    (Tensor.is_contiguous, Tensor.stride, Tensor.storage_offset, Tensor.dim_order)
)
_OF_STRIDES = (Tensor.stride, Tensor.dim_order)
_MODES = {getattr(Tensor, name).__get__: name for name in ("requires_grad", "grad_fn")} | {
    Tensor.is_inference: "is_inference()"
}
_BITS = {
    Tensor.is_conj: "is_conj()", torch.is_conj: "is_conj()",
    Tensor.is_neg: "is_neg()", torch.is_neg: "is_neg()",
}  # fmt: skip
_METHODS = (
    "torch.overrides", "torch._tensor", "turbotx.capture.value_questions",
    "turbotx.capture.caught_errors",
)  # fmt: skip
_STORAGES = frozenset((Tensor.untyped_storage, Tensor.storage))


class LayoutQuestions(TorchFunctionMode):
    """While active, records what the user's code queries of layouts.

    asked: the indices of the inputs, and whether their strides were queried, or contiguity alone.
    sizes: sizes that decide an answer by being 1 or 0.
    """

    def __init__(self, note_gradients: Callable[[torch.Tensor], bool | None]) -> None:
        """note_gradients: tells whether a parameter requires gradients, None for other tensors."""
        super().__init__()
        self._note_gradients = note_gradients
        self.asked: dict[int, bool] = {}
        self.sizes: set[Expr] = set()
        self._places: dict[int | None, int] = {}

    def begin(self, inputs: Sequence[torch.Tensor]) -> None:
        """Set the call's tensors."""
        places = ((memory_of(t), i) for i, t in enumerate(inputs))
        self._places = {memory: i for memory, i in places if memory is not None}
        self._sizes = {i: _find_sizes(t) for i, t in enumerate(inputs)}
        self.asked.clear()
        self.sizes.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _MODES and _is_asked_by_user():
            asked = self._note_gradients(args[0]) if _MODES[func] == "requires_grad" else None
            if asked is not None:
                return asked
            raise CaptureError(
                f"its code asks for the {_MODES[func]} of a tensor, which a trace does not know, "
                "since it runs without gradients: use torch.is_grad_enabled() or "
                "is_inference_mode_enabled()"
            )
        if func in _BITS and _is_asked_by_user():
            raise CaptureError(
                f"its code asks for {_BITS[func]} of a tensor, which a trace does not know, since "
                "it computes with resolved tensors: call resolve_conj() or resolve_neg() without "
                "asking"
            )
        asks = func in _QUESTIONS or func in _STORAGES
        if asks and _is_asked_by_user():
            place = self._places.get(memory_of(args[0]))
            if place is not None and func in _STORAGES:
                raise CaptureError(
                    "it reads the storage of an input, which may be larger than the input in "
                    "another call: use the input's own numel() and element_size()"
                )
            if place is None and func in _OF_STRIDES and _asks_of_ones(*args, **(kwargs or {})):
                raise CaptureError(
                    "it asks for the stride of a dim of size 1 of a tensor that it has computed, "
                    "which tells only how it was computed: ask for the strides of dims of more "
                    "elements, or whether it is contiguous"
                )
            if place is not None:
                self.asked[place] = self.asked.get(place, False) or func in _OF_STRIDES
                self.sizes |= self._sizes[place]
            self.sizes |= _find_sizes(args[0])
        plain = func is Tensor.contiguous and len(args) == 1 and not kwargs
        if plain and memory_of(args[0]) in self._places:
            # PyTorch calls no op for a dense tensor, as the trace's inputs are.
            return torch.ops.aten.contiguous.default(args[0])
        return func(*args, **(kwargs or {}))


def _asks_of_ones(tensor: torch.Tensor, dim: Any = None, **rest: Any) -> bool:
    """Return whether the stride of a dim of size 1 is asked for. dim: None for all."""
    with torch._C.DisableTorchFunction():
        sizes = tensor.shape if not isinstance(dim, int) else (tensor.shape[dim],)
        return isinstance(tensor, FakeTensor) and any(type(n) is int and n == 1 for n in sizes)


def _find_sizes(tensor: torch.Tensor) -> set[Expr]:
    """Return the sizes and the strides of a tensor that are not numbers."""
    with torch._C.DisableTorchFunction():
        numbers = (*tensor.shape, *tensor.stride()) if memory_of(tensor) is not None else ()
    return {expr(n) for n in numbers if isinstance(n, torch.SymInt)}


def _is_asked_by_user() -> bool:
    """Return whether the user's code makes the query, skipping tensor methods written in Python and
    the modes inside this one."""
    return is_users(caller_outside(sys._getframe(2), _METHODS))
