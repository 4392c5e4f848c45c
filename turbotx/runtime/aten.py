"""The parts of a program that PyTorch runs: ops without a kernel, all ops if there is no compiler,
and the views that a call returns.

In: plain data of an `Executable`. Out: functions of one run's state, which work on tensors in
planned memory and write their results there, like any other launch::

    cumsum  ->  step(state): window(out).copy_(aten.cumsum(window(x), 1))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from turbotx.errors import IndexOutOfRangeError, VerifyError
from turbotx.ir.sizes import Sizes
from turbotx.program.executable import PytorchCall, ReturnedView, WholeTensor, Window
from turbotx.runtime.state import Maker, RunState, Step


def make_step(call: PytorchCall, dims: Sequence[str]) -> Step:
    """Return a function that runs one launch by PyTorch and stores its results."""
    arguments, options = _make(call.args, dims), _make(call.kwargs, dims)
    results = [None if w is None else make_window(w, dims) for w in call.writes]
    # The graph's forward is called directly, to bypass global module hooks of the user.
    target = call.target.forward if isinstance(call.target, nn.Module) else call.target

    def step(state: RunState) -> None:
        windows = [None if r is None else r(state) for r in results]
        call_into(target, arguments(state), options(state), windows, call.has_out)

    return step


def call_into(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any],
    windows: Sequence[torch.Tensor | None], has_out: bool,
) -> None:  # fmt: skip
    """Run `target` and copy its results to `windows`, one each, None for unused results.

    has_out: the op's `out` overload writes the first window. Raises VerifyError for a result whose
    dtype or shape differs from its window; IndexOutOfRangeError for an index that PyTorch rejects.
    """
    if has_out:
        window = windows[0]
        assert window is not None
        place, shape = window.data_ptr(), window.shape
        target.overloadpacket.out(*args, **kwargs, out=window)
        if window.data_ptr() != place or window.shape != shape:
            raise VerifyError(f"{target} gives {tuple(window.shape)}, and the graph {tuple(shape)}")
        return
    try:
        made = target(*args, **kwargs)
    except IndexError as error:
        raise IndexOutOfRangeError(f"{target}: {error}") from error
    made = (made,) if isinstance(made, torch.Tensor) else made
    for window, value in zip(windows, made, strict=True):
        if window is None:
            continue
        if value.dtype != window.dtype or value.shape != window.shape:
            raise VerifyError(
                f"{target} gives {value.dtype} {tuple(value.shape)}, and the graph says "
                f"{window.dtype} {tuple(window.shape)}"
            )
        window.copy_(value)


def make_leaf(leaf: Any, dims: Sequence[str]) -> Maker:
    """Return a function that makes one leaf of the output: a tensor, a view of one, or a value."""
    if isinstance(leaf, WholeTensor):
        return lambda state: state.whole(leaf.name, leaf.dtype)
    if isinstance(leaf, ReturnedView):
        return _make_view(leaf, dims)
    if isinstance(leaf, (Window, Sizes)):
        return _make(leaf, dims)
    if isinstance(leaf, set):  # a copy, since the caller may change it
        return lambda state: set(leaf)
    return lambda state: leaf


def make_window(window: Window, dims: Sequence[str]) -> Callable[[RunState], torch.Tensor]:
    """Return a function from the run's state to the tensor that a window shows; with a negative
    stride, which PyTorch's tensors have not, a copy of it."""
    name, dtype, rank = window.tensor, window.dtype, len(window.shape.texts)
    texts = (window.shape.texts, window.strides.texts, window.offset.texts)
    evaluate = Sizes(tuple(text for part in texts for text in part)).compile(dims)

    def look(state: RunState) -> torch.Tensor:
        base, numbers = state.whole(name, dtype), evaluate(*state.dims)
        shape, strides = numbers[:rank], numbers[rank:-1]
        start = base.storage_offset() + numbers[-1]
        if min(strides, default=0) >= 0:
            return base.as_strided(shape, strides, start)
        back = [d for d, stride in enumerate(strides) if stride < 0]
        start += sum(strides[d] * (shape[d] - 1) for d in back)
        return base.as_strided(shape, [abs(s) for s in strides], start).flip(back)

    return look


def _make_view(leaf: ReturnedView, dims: Sequence[str]) -> Callable[[RunState], torch.Tensor]:
    steps = [(op, _make(args, dims), _make(kwargs, dims)) for op, args, kwargs in leaf.steps]

    def look(state: RunState) -> torch.Tensor:
        given = state.given.get(leaf.root)
        value: Any = state.tensors[leaf.root] if given is None else given
        for op, args, kwargs in steps:
            value = op(value, *args(state), **kwargs(state))
        return value

    return look


def _make(structure: Any, dims: Sequence[str]) -> Maker:
    """Return a function that rebuilds call arguments, with tensors and sizes filled in."""
    if isinstance(structure, Window):
        return make_window(structure, dims)
    if isinstance(structure, Sizes):
        evaluate = structure.compile(dims)
        return lambda state: evaluate(*state.dims)[0]
    if isinstance(structure, (list, tuple)):
        parts = [_make(v, dims) for v in structure]
        return lambda state: [part(state) for part in parts]
    if isinstance(structure, Mapping):
        named = {k: _make(v, dims) for k, v in structure.items()}
        return lambda state: {k: v(state) for k, v in named.items()}
    return lambda state: structure
