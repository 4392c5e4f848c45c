"""Outside: one launch that PyTorch runs, its results put where the plan wants them.

In: a function of tensors, its arguments and a window of memory for each result. Out: nothing::

    call_into(torch.ops.aten.cumsum.default, (x, 1), {}, [window], has_out=True)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from turbotx.errors import IndexOutOfRangeError, VerifyError


def call_into(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any],
    windows: Sequence[torch.Tensor | None], has_out: bool,
) -> None:  # fmt: skip
    """Run `target`; its results end in `windows`, one each, None for those nobody reads.

    has_out: the op's `out` overload writes the first window itself. Raises VerifyError for a result
    of another dtype or shape than its window, which is what the graph says, and
    IndexOutOfRangeError for an index that PyTorch refuses.
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
