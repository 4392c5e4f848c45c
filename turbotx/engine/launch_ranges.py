"""Launch ranges: show each launch of a call as a range in torch.profiler (`launch_ranges=True`).

In: a program. Out: a watch that opens a range before each launch and closes it after. The
profiler's table and trace then show::

    turbotx: BertModel  >  fused_add_layer_norm_0, linear_gelu_0, attention_0, ...
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch.profiler import record_function

from turbotx.runtime.program import Program
from turbotx.runtime.state import RunState


class LaunchRanges:
    """The ranges of one call. Launches then run one by one; on a GPU, without a CUDA graph."""

    def __init__(self, program: Program) -> None:
        self._launches = program.executable.launches
        self._range: AbstractContextManager[Any] | None = None

    def before(self, launch: int, state: RunState) -> None:
        """Open the range of a launch."""
        self._range = record_function(self._launches[launch].name)
        self._range.__enter__()

    def after(self, launch: int, state: RunState) -> None:
        """Close the range."""
        assert self._range is not None
        self._range.__exit__(None, None, None)
