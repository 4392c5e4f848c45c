"""Recurrent layers: nn.LSTM, nn.GRU and nn.RNN as one op each, at any number of steps.

In: a call of such an op on fake tensors. Out: its fake results, by their sizes alone; PyTorch's own
rule runs every step, so that the number of steps would be a constant of the capture::

    lstm(x (3, 5, 8), ...)  ->  (3, 5, hidden), (layers, 5, hidden), (layers, 5, hidden)

Under autocast PyTorch computes parts of such an op in another dtype, which a cast before the op
cannot express: there it stays as it is, one capture for every number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensor

from turbotx.capture.ambient import DEVICES

aten = torch.ops.aten
_BY_STEPS = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
_OF_PACKED = (aten.lstm.data, aten.gru.data, aten.rnn_tanh.data, aten.rnn_relu.data)
"""The same of an `nn.utils.rnn.PackedSequence`: the rows of all steps, and the batch of each."""
_KEYS = (DispatchKey.Autograd, DispatchKey.CPU, DispatchKey.CUDA, DispatchKey.Meta)
"""What a call is looked up by under a trace: torch.export puts its own rule under all of them."""
_OPS = frozenset((*_BY_STEPS, *_OF_PACKED))


def recurrent_ops() -> frozenset[str]:
    """Return the names of the ops that are one node of a graph, as autocast is now set."""
    return frozenset(map(str, filter(is_recurrent, _OPS)))


@contextmanager
def recurrent_layers_whole() -> Iterator[None]:
    """Context manager: let traces describe such calls. PyTorch's own rule is a Python function that
    other threads do not use unless they trace as well."""
    with ExitStack() as stack:
        for op in filter(is_recurrent, _OPS):
            rule = partial(_describe_traced, op, op.decompose)
            stack.callback(op._dispatch_cache.clear)
            stack.enter_context(mock.patch.dict(op.py_kernels, dict.fromkeys(_KEYS, rule)))
            op._dispatch_cache.clear()
        yield


def _describe_traced(func: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Describe a call; run one of tensors that hold numbers, as of constants of the model."""
    traced = any(isinstance(x, FakeTensor) for x in pytree.tree_leaves((args, kwargs)))
    return describe_recurrent(func, args, kwargs) if traced else run(*args, **kwargs)


def is_recurrent(func: Any) -> bool:
    """Return whether a call of an op is one node of a graph, as autocast is now set."""
    return func in _OPS and not any(map(torch.is_autocast_enabled, DEVICES))


def describe_recurrent(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the fake results of a call: the outputs of all steps, then the last states."""
    names = [a.name for a in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    states = given["hx"] if isinstance(given["hx"], (list, tuple)) else [given["hx"]]
    width = states[0].shape[-1] * (2 if given["bidirectional"] else 1)
    packed = "data" in given
    rows: torch.Tensor = given["data"] if packed else given["input"]
    sizes = [*rows.shape[:-1], width]
    if not packed and given["batch_first"]:  # computed with the steps first
        output = rows.new_empty([sizes[1], sizes[0], width]).transpose(0, 1)
    else:
        output = rows.new_empty(sizes)
    return (output, *(rows.new_empty(state.shape) for state in states))
