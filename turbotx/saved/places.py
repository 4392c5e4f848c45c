"""Places: the device on which a saved file's programs run, and the target to load for it.

In: the targets of a file, and the requested device. Out: the device with the best matching target;
or an error that says what the file has::

    choose_target(["cpu", "sm_80", "sm_90"], "sm_89")  ->  "sm_80"

A cubin runs on its own compute capability and newer ones of the same major version.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from turbotx.errors import DeviceError, SavedFileError
from turbotx.runtime.device import Device
from turbotx.runtime.placement import device_named, open_device

CPU = torch.device("cpu")


def choose_target(targets: Iterable[str], device: str) -> str | None:
    """Return the best target whose cubins run on a device; None if there is none."""
    wanted = _capability(device)
    fitting = [t for t in targets if t != "cpu" and _runs_on(_capability(t), wanted)]
    return max(fitting, key=_capability, default=None)


def _runs_on(kept: tuple[int, int], device: tuple[int, int]) -> bool:
    return kept[0] == device[0] and kept[1] <= device[1]


def _capability(target: str) -> tuple[int, int]:
    number = int(target.removeprefix("sm_"))
    return number // 10, number % 10


def open_place(
    path: Any, manifest: Mapping[str, Any], weights: Any, device: str | torch.device | None
) -> tuple[str, Device | None]:
    """Return the target to load and its GPU, None for the CPU.

    The default device is that of a module given as weights, else the CPU if the file has a program
    for it, else the current GPU. Raises SavedFileError if the file has no program for this machine.
    """
    targets: Sequence[str] = manifest.get("targets", ["cpu"])
    place = device_named(device) if device is not None else _default_place(targets, weights)
    held = f"{path} has programs for {' and '.join(targets)}"
    again = "save the model with turbotx.save(..., targets=[{!r}]) for it"
    if place.type == "cpu":
        if "cpu" in targets:
            return "cpu", None
        raise SavedFileError(
            f"{held}, not for CPUs: load it on such a GPU, or {again.format('cpu')}"
        )
    try:
        found = open_device(place, "auto", builds=False)
    except DeviceError as error:
        raise SavedFileError(f"{held}, and there is no GPU to load it on: {error}") from error
    assert found is not None
    target = choose_target(targets, found.target)
    if target is None:
        raise SavedFileError(
            f"{held}, and {place} ({found.describe()}) is {found.target}, which runs none of them: "
            + again.format(found.target)
        )
    return target, found


def _default_place(targets: Sequence[str], weights: Any) -> torch.device:
    if isinstance(weights, nn.Module):
        for tensor in weights.parameters():
            return tensor.device
    return CPU if "cpu" in targets else torch.device("cuda")
