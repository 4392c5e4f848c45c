"""Light export: leaves out what PyTorch's export makes in every layer and nobody reads.

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
from torch.fx.experimental import proxy_tensor

from turbotx.capture.tracing import replaced_in_thread

# Private functions of PyTorch, the same from 2.11 to 2.13: without one, it is as slow as before.
_LOOKS = ("track_tensor_tree", "_extract_tensor_metadata")


@contextmanager
def light_export() -> Iterator[None]:
    """Let this thread's exports be light, inside the context."""
    write = fx.GraphModule.recompile

    def recompile(module: fx.GraphModule) -> None:
        cls: Any = type(module)

        def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
            write(self)
            return self.forward(*args, **kwargs)

        if cls is not fx.GraphModule:  # every graph module has a class of its own
            cls.forward = forward

    with ExitStack() as stack:
        stack.enter_context(replaced_in_thread(fx.GraphModule, "recompile", recompile))
        for name in _LOOKS:
            if hasattr(proxy_tensor, name):
                look = _unseen(getattr(proxy_tensor, name))
                stack.enter_context(replaced_in_thread(proxy_tensor, name, look))
        yield


def _unseen(look: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(look)
    def unseen(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return look(*args, **kwargs)

    return unseen
