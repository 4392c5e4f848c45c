"""Attention kernels: which of PyTorch's kernels a trace follows inside of attention.

In: a call's tensors. Out: context managers to trace under, in the order to try::

    attention_kernels([ids_on_a_gpu])  ->  (the math kernel, the device's own choice)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def attention_kernels(
    tensors: Sequence[torch.Tensor],
) -> Sequence[Callable[[], AbstractContextManager[object]]]:
    """Return context managers that select an attention kernel while tracing, in the order to try.

    Attention stays one op in the graph, but tracing follows the choice inside it. On CUDA the
    memory-efficient kernel tests whether the mask's length is a multiple of 16, which would become
    a guard on seq; the math kernel tests nothing. A model that cannot be traced with it, because it
    views the result in the layout of the fused kernels, is traced with the device's own choice.
    """
    return (_plain_attention, nullcontext) if any(t.is_cuda for t in tensors) else (nullcontext,)


@contextmanager
def _plain_attention() -> Iterator[None]:
    # The setting is global: concurrent contexts could restore it in the wrong order.
    with _choosing_attention, sdpa_kernel(SDPBackend.MATH):
        yield


_choosing_attention = threading.RLock()
