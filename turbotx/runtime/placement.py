"""Placement: where a call runs, from where its tensors and parameters lie.

In: a module and the leaves of a call. Out: one torch device, and for a GPU the `Device` that its
programs are bound to::

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
from turbotx.runtime.cuda.device import CudaDevice, require_triton
from turbotx.runtime.device import Device


def find_device(model: nn.Module, leaves: Sequence[Any]) -> torch.device:
    """Return the one device of a call; raise InputError where there are several.

    Single numbers may stay on the CPU, as PyTorch allows.
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


def _rank(place: torch.device) -> bool:
    return place.type == "cuda"


def open_device(place: torch.device, backend: str, builds: bool = True) -> Device | None:
    """Return the device for a backend, None for the CPU; raise OptionsError if they do not fit.

    builds: kernels are to be compiled for it. Raises DeviceError where there is a GPU that turbotx
    cannot use, and says why.
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
    """One object a GPU, so that all programs on it share the kernels that they have in common."""
    return CudaDevice(place)


def target_of(device: Device | None) -> tuple[str, str]:
    """Return what programs for a device are compiled for, and its name; None: the CPU."""
    return ("cpu", "") if device is None else (device.target, device.describe())
