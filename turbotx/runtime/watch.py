"""Watch: the callbacks around every launch of a run.

In: given to `Program.run` for one call. Out: called before and after each launch with the run's
tensors; what it writes is seen by the launches after it::

    program.run(binding, tensors, watch=watch)    # watch.before(0, state), .after(0, state), ...
"""

from __future__ import annotations

from typing import Protocol

from turbotx.runtime.state import RunState


class Watch(Protocol):
    """`launch` counts from 0; `state` has the run's memory and tensors."""

    def before(self, launch: int, state: RunState) -> None:
        """See a run's state before a launch."""

    def after(self, launch: int, state: RunState) -> None:
        """See a run's state after a launch."""
