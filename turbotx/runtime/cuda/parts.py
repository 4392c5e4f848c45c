"""Parts: the kernels that a launch of a GPU program queues at one shape.

In: a program's evaluated sizes. Out: kernels with their argument list and grid, or PyTorch's call;
the same for compiled and saved programs::

    family.pick(sizes)  ->  [Part("kernel", fused_add_layer_norm_0, (40, 1, 1))]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from turbotx.kernels.job import Binary, Job
from turbotx.runtime.device import Grid


@dataclass(frozen=True)
class Part:
    """One kernel of a launch; without a job, PyTorch's call.

    which: the name of its argument list.
    """

    which: str
    job: Job | Binary | None = None
    grid: Grid = (1, 1, 1)


class Family(Protocol):
    """All variants of one launch; equal launches can share a family."""

    def pick(self, sizes: Sequence[int]) -> Sequence[Part]:
        """Return the parts to run at these sizes; a grid with a zero is skipped."""
