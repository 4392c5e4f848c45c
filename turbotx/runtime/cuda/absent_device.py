"""Absent device: stands in for a GPU so that programs can be compiled, inspected and saved.

In: a target. Out: the device interface that creating a program needs; nothing runs on it::

    CudaRuntime(kernels, weights, AbsentDevice("sm_90"))
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch

from turbotx.errors import DeviceError
from turbotx.kernels.job import Binary, Job


class AbsentDevice:
    """The device of a target that is not present; kernels are neither built nor loaded."""

    torch_device = torch.device("cpu")

    def __init__(self, target: str) -> None:
        self.target = target

    def describe(self) -> str:
        """Return a name that no tuned table has."""
        return f"no device, {self.target}"  # no tuned table has this name

    def active(self) -> AbstractContextManager[object]:
        """Return a context manager that does nothing."""
        return nullcontext()

    def load(self, jobs: Sequence[Job]) -> tuple[list[Any], int]:
        """Return the jobs themselves in place of handles, and 0 builds."""
        return list(jobs), 0

    def place(self, binaries: Sequence[Binary]) -> list[Any]:
        """Return the binaries themselves in place of handles."""
        return list(binaries)

    def new_status(self, count: int) -> torch.Tensor:
        """Return zeroed int32 in ordinary memory."""
        return torch.zeros(count, dtype=torch.int32)

    def wait(self) -> None:
        """Return at once: nothing is ever queued."""

    def retain(self, tensors: Sequence[torch.Tensor]) -> None:
        """Do nothing: no stream reads the tensors."""

    def is_capturing(self) -> bool:
        """Return False: there is no stream."""
        return False

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise DeviceError(f"this program was compiled for {self.target} to be saved: run it there")

    launch = stream = call = recorder = clock = elapsed = _refuse


def absent_device(target: str) -> AbsentDevice | None:
    """Return an absent device of a GPU target; None for the CPU."""
    return None if target == "cpu" else AbsentDevice(target)
