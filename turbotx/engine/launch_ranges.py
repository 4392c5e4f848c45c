"""Launch ranges: each launch of a call as a range in torch.profiler, where `launch_ranges` asks.

In: a program. Out: a watch that opens a range before a launch and ends it behind; what the
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
    """The ranges of one call. Launches run one by one under it, on a GPU without a CUDA graph."""

    def __init__(self, program: Program) -> None:
        self._launches = program.executable.launches
        self._range: AbstractContextManager[Any] | None = None

    def before(self, launch: int, state: RunState) -> None:
        """Open the range of a launch."""
        self._range = record_function(self._launches[launch].name)
        self._range.__enter__()

    def after(self, launch: int, state: RunState) -> None:
        """End it."""
        assert self._range is not None
        self._range.__exit__(None, None, None)
