"""Placement: the device on which a call runs, from the devices of its tensors and parameters.

In: a module and the leaves of a call. Out: one torch device, and for a GPU the `Device` to which
programs are bound::

    find_device(model, [input_ids, attention_mask])  ->  device("cuda:0")
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from turbotx.errors import InputError, OptionsError
from turbotx.runtime.cuda.device import CudaDevice, require_cuda, require_triton
from turbotx.runtime.device import Device


def find_device(model: nn.Module, leaves: Sequence[Any]) -> torch.device:
    """Return the device of a call; raise InputError if there are several.

    One-element tensors may stay on the CPU, as in PyTorch.
    """
    places: dict[torch.device, str] = {}
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            places.setdefault(leaf.device, "an input")
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.numel() > 1:
            places.setdefault(tensor.device, f"parameter {name}")
    if len(places) > 1:
        seen = ", ".join(f"{what} is on {place}" for place, what in places.items())
        raise InputError(
            f"a call of {type(model).__name__} needs all its tensors on one device, but {seen}: "
            f"move the model and its inputs with .to({str(max(places, key=_rank))!r})"
        )
    return next(iter(places), torch.device("cpu"))


def device_named(name: str | torch.device) -> torch.device:
    """Return the device of a name such as "cuda:1"; raise OptionsError if turbotx runs on none of
    its kind."""
    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise OptionsError(
            f"device {name!r} is none that PyTorch knows: write cpu, cuda, or cuda:1"
        ) from error
    if place.type not in ("cpu", "cuda"):
        raise OptionsError(
            f"device {str(place)!r}: turbotx runs on CPUs and NVIDIA GPUs: write cpu or cuda"
        )
    return place


def require_device(name: str) -> None:
    """Raise OptionsError or DeviceError if turbotx cannot run on the device of that name here."""
    place = device_named(name)
    if place.type == "cuda":
        require_cuda(place)


def _rank(place: torch.device) -> bool:
    return place.type == "cuda"


def open_device(place: torch.device, backend: str, builds: bool = True) -> Device | None:
    """Return the `Device` for a backend, None for the CPU; raise OptionsError if they do not match.

    builds: whether kernels will be compiled for it. Raises DeviceError if turbotx cannot use the
    GPU, and says why.
    """
    if place.type == "cuda":
        if backend == "cpp":
            raise OptionsError(
                f'backend="cpp" runs on CPUs, and the call\'s tensors are on {place}: move them '
                'with .cpu(), or use backend="triton"'
            )
        if place.index is None and torch.cuda.is_available():
            place = torch.device("cuda", torch.cuda.current_device())
        device = _cuda_device(place)
        if builds:
            require_triton()
        return device
    if backend == "triton":
        raise OptionsError(
            f'backend="triton" runs on NVIDIA GPUs, and the call\'s tensors are on {place}: move '
            'the model and its inputs with .to("cuda"), or use backend="cpp"; kernels for a GPU '
            "that is not here are built by `turbotx compile --target sm_90`"
        )
    return None


@functools.cache
def _cuda_device(place: torch.device) -> CudaDevice:
    """Return one object per GPU, so that programs share kernels."""
    return CudaDevice(place)


def target_of(device: Device | None) -> tuple[str, str]:
    """Return the target and name of a device; None means the CPU."""
    return ("cpu", "") if device is None else (device.target, device.describe())
