"""Idle dropout: keeps dropout in evaluation mode an alias of its argument, as in eager mode.

In: calls of dropout under a trace with training off. Out: an alias, so that later in-place writes
to the argument show in the result, as in eager mode; PyTorch's functionalization treats the result
as a separate tensor::

    z = torch.dropout(y, 0.1, False)  ->  z = aten.alias(y)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

# The name and default of the argument that enables training.
_DROPOUTS: dict[Any, tuple[str, bool]] = {
    torch.dropout: ("train", True),
    torch.alpha_dropout: ("train", True),
    torch.feature_dropout: ("train", True),
    torch.feature_alpha_dropout: ("train", True),
    F.dropout: ("training", True),
    F.dropout1d: ("training", True),
    F.dropout2d: ("training", True),
    F.dropout3d: ("training", True),
    F.alpha_dropout: ("training", False),
    F.feature_alpha_dropout: ("training", False),
}


class IdleDropout(TorchFunctionMode):
    """While active, replaces dropout with training off by an alias of its argument."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            name, default = _DROPOUTS[func]
            given = {"p": 0.5, name: default, **dict(zip(("input", "p", name), args, strict=False))}
            given |= kwargs
            if not given[name] and 0.0 <= given["p"] <= 1.0:  # other calls are errors
                return torch.ops.aten.alias.default(given["input"])
        return func(*args, **kwargs)
