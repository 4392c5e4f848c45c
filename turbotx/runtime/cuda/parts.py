"""Parts: what a launch of a GPU program queues at one shape.

In: a program's evaluated sizes. Out: kernels by which list of arguments and on which grid, or
PyTorch's part; compiled programs and saved ones answer alike::

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
    """One thing that a launch queues: a kernel, or without a job what PyTorch runs.

    which: the list of arguments that it takes, among the launch's own.
    """

    which: str
    job: Job | Binary | None = None
    grid: Grid = (1, 1, 1)


class Family(Protocol):
    """All variants of one launch; equal launches may share one."""

    def pick(self, sizes: Sequence[int]) -> Sequence[Part]:
        """Return what to run at these sizes; a grid with a zero means nothing."""
