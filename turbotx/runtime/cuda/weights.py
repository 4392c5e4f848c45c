"""Placed weights: addresses of a program's weights on a device.

In: parameters and hoisted constants. Out: their addresses in a program's table, and a
`WeightsVersion`, which keeps their memory alive while a table or a graph refers to it::

    version, held = placed.fill(table); placed.use(held)    # before a stream reads them
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch

from turbotx.errors import InputError
from turbotx.runtime.device import Device
from turbotx.runtime.weights import Weights


class WeightsVersion:
    """The memory of one version of the weights, and the streams that read it.

    tensors: by name in the program, sharing the storage of that version: a parameter may replace
    its storage while a graph still reads the old one.
    """

    def __init__(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        self.version = version
        self.tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.streams: set[Any] = set()


class PlacedWeights:
    """A program's weights on its device; thread-safe."""

    def __init__(self, weights: Weights, device: Device, slots: Mapping[str, int]) -> None:
        """slots: indices in the program's table by name."""
        self._weights, self._device, self._slots = weights, device, slots
        self._held = WeightsVersion(-1, {})
        self._lock = threading.Lock()
        # Other threads read on their own streams, which do not wait for this one.
        weights.settle = device.wait

    def fill(self, table: Any) -> tuple[int, WeightsVersion]:
        """Write the addresses to a table; return the version and the object that keeps them alive.

        Raises InputError if a parameter is on another device.
        """
        with self._lock:
            version, tensors = self._weights.version, self._weights.tensors
            if self._held.version != version:
                read = {n: t for n, t in tensors.items() if n in self._slots}
                moved = {n: self._place(n, t) for n, t in read.items()}
                if any(moved[n] is not t for n, t in read.items()):
                    self._device.wait()
                self._held = WeightsVersion(version, moved)
            held = self._held
        for name, tensor in held.tensors.items():
            table[self._slots[name]] = tensor.data_ptr()
        return version, held

    @property
    def held(self) -> WeightsVersion:
        """The version written last."""
        return self._held

    def are_filled(self) -> bool:
        """Return whether the weights are current: nothing has to be derived or copied."""
        return not self._weights.is_stale() and self._held.version == self._weights.version

    def use(self, held: WeightsVersion) -> None:
        """Record that the current stream reads them, so that the allocator does not reuse their
        memory before the stream is done."""
        stream = self._device.stream()
        if stream not in held.streams:
            self._device.retain(list(held.tensors.values()))
            held.streams.add(stream)

    def _place(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor, or a copy if its address is no multiple of 16. Raises InputError if it
        is on another device."""
        here = self._device.torch_device
        if tensor.device != here:
            if tensor.numel() != 1:
                raise InputError(
                    f"parameter {name} is on {tensor.device}, and the call's inputs are on {here}: "
                    "move the whole model there with .to(...)"
                )
            return tensor.to(here)
        return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
