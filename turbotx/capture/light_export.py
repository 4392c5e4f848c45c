"""Light export: skips parts of PyTorch's export whose results are unused here.

In: a trace. Out: the same graph; a graph module's Python code is written when it is called, and the
tracer's own looks at tensors are not shown to the modes that watch the model's code::

    with light_export():  torch.export.export(model, ...)   # no code for seven states of the graph
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx
from torch._export import utils
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import _trace, _unlift
from torch.fx.experimental import proxy_tensor
from torch.utils._sympy.symbol import symbol_is_type

from turbotx.capture.tracing import replaced_in_thread
from turbotx.ir.fake_results import BY_VALUES

_OPS = "_materialize_cpp_cia_ops"
_CHECKS = "_ok_to_generate_guards_fn"


@contextmanager
def light_export() -> Iterator[None]:
    """Context manager: leave out of this thread's exports what is not used here."""
    with ExitStack() as stack:
        stack.enter_context(late_code())
        for module, name, lighten in _LIGHTENED:
            if hasattr(module, name):
                light = lighten(getattr(module, name))
                stack.enter_context(replaced_in_thread(module, name, light))
        yield


@contextmanager
def light_decomposition() -> Iterator[None]:
    """Context manager: this thread's decompositions of whole graphs list PyTorch's ops in C++ once,
    not twice for each of 27 namespaces: a seventh of a small capture. They add no call that checks
    an export's guards, which `guards.py` does: it fails where its tensors are not given."""
    with ExitStack() as stack:
        if hasattr(utils, _OPS):
            listed = functools.cache(getattr(utils, _OPS))
            stack.enter_context(replaced_in_thread(utils, _OPS, listed))
        if hasattr(_unlift, _CHECKS):
            stack.enter_context(replaced_in_thread(_unlift, _CHECKS, lambda: False))
        yield


@contextmanager
def late_code() -> Iterator[None]:
    """Context manager: graph modules made in this thread write their code when first called."""
    write = fx.GraphModule.recompile

    def recompile(module: fx.GraphModule) -> None:
        cls: Any = type(module)

        def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
            write(self)
            return self.forward(*args, **kwargs)

        if cls is not fx.GraphModule:  # every graph module has a class of its own
            cls.forward = forward

    with replaced_in_thread(fx.GraphModule, "recompile", recompile):
        yield


def _left_out(describe: Callable[..., Any]) -> Callable[..., None]:
    """Return what stands for a description of a node's tensor, which its fake tensor gives too."""
    return lambda *args, **kwargs: None


def _unseen(look: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(look)
    def unseen(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return look(*args, **kwargs)

    return unseen


def _only_of_values(replace: Callable[[fx.GraphModule], None]) -> Callable[[fx.GraphModule], None]:
    """Return PyTorch's search for the sizes that come from values, left out where there is none."""

    def search(module: fx.GraphModule) -> None:
        values = (node.meta.get("val") for node in module.graph.nodes)
        modes = (x.fake_mode for x in values if isinstance(x, FakeTensor))
        shape_env = next((m.shape_env for m in modes if m.shape_env is not None), None)
        known: Any = getattr(shape_env, "var_to_range", None)
        if known is None or any(symbol_is_type(s, BY_VALUES) for s in known):
            replace(module)

    return search


_LIGHTENED: tuple[tuple[Any, str, Callable[[Callable[..., Any]], Callable[..., Any]]], ...] = (
    (proxy_tensor, "track_tensor_tree", _unseen),
    (_trace, "_fakify_params_buffers", _unseen),
    (proxy_tensor, "_extract_tensor_metadata", _left_out),
    (_trace, "_replace_unbacked_bindings", _only_of_values),
)
"""Private functions of PyTorch, the same from 2.11 to 2.13, and what makes each light: without one,
it is as slow as before."""
