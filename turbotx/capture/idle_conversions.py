"""Idle conversions: `module.to(dtype)` in forward where it changes nothing, as in eager mode.

In: a trace, in which PyTorch would exchange all of a module's parameters, and cannot. Out: modules
that are converted to what they are already stay as they are; other conversions are refused, since
they would change the model at its first call::

    self.classifier = self.classifier.to(self.dtype)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from turbotx.errors import CaptureError

_original = nn.Module._apply


@contextmanager
def idle_conversions() -> Iterator[None]:
    """Context manager: leave modules alone that a trace converts to their own dtype and device."""
    with mock.patch.object(nn.Module, "_apply", _apply):
        yield


def _apply(
    self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    tensors = [*self.named_parameters(recurse=recurse), *self.named_buffers(recurse=recurse)]
    if not any(isinstance(tensor, FakeTensor) for _, tensor in tensors):
        return _original(self, function, recurse)  # of another thread, which traces nothing
    changed = [name for name, tensor in tensors if function(tensor) is not tensor]
    if not changed:
        return self
    try:
        return _original(self, function, recurse)
    except RuntimeError as error:
        raise CaptureError(
            f"forward converts {type(self).__name__}.{changed[0]} to another dtype or device: "
            "that changes the model. Convert it before it is called, or convert the call's tensors"
        ) from error
