"""Idle dropout: keeps dropout that does not train an alias of its argument, as in eager.

In: calls of dropout under a trace that are told not to train. Out: an alias, so that what is
written into the argument afterwards shows in the result, as in eager; PyTorch's functionalization
takes the result for a tensor of its own::

    z = torch.dropout(y, 0.1, False)  ->  z = aten.alias(y)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

# By the name and the default of the argument that says whether it trains.
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
    """While it is entered, dropout that does not train is an alias of its argument."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            name, default = _DROPOUTS[func]
            given = {"p": 0.5, name: default, **dict(zip(("input", "p", name), args, strict=False))}
            given |= kwargs
            if not given[name] and 0.0 <= given["p"] <= 1.0:  # others are errors
                return torch.ops.aten.alias.default(given["input"])
        return func(*args, **kwargs)
