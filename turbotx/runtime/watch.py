"""Watch: callbacks around every launch of a run.

In: passed to `Program.run` for one call. Out: called before and after each launch with the run's
tensors; later launches see what it writes::

    program.run(binding, tensors, watch=watch)    # watch.before(0, state), .after(0, state), ...
"""

from __future__ import annotations

from typing import Protocol

from turbotx.runtime.state import RunState


class Watch(Protocol):
    """`launch` is an index from 0; `state` has the run's memory and tensors."""

    def before(self, launch: int, state: RunState) -> None:
        """Observe the state before a launch."""

    def after(self, launch: int, state: RunState) -> None:
        """Observe the state after a launch."""
