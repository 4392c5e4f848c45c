"""Outside: one launch that PyTorch runs, its results put where the plan wants them.

In: a function of tensors, its arguments and a window of memory for each result. Out: nothing::

    call_into(torch.ops.aten.cumsum.default, (x, 1), {}, [window], has_out=True)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def call_into(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any],
    windows: Sequence[torch.Tensor | None], has_out: bool,
) -> None:  # fmt: skip
    """Run `target`; its results end in `windows`, one each, None for those nobody reads.

    has_out: the op's `out` overload writes the first window itself.
    """
    if has_out:
        target.overloadpacket.out(*args, **kwargs, out=windows[0])
        return
    made = target(*args, **kwargs)
    made = (made,) if isinstance(made, torch.Tensor) else made
    for window, value in zip(windows, made, strict=True):
        if window is not None:
            window.copy_(value)
