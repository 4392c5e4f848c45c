"""Gradients: which parameters of a model require them, where code under a trace asks.

In: a recorder, and a parameter or a module that is asked about. Out: the answer, which is noted,
and a place among those of a record, which is compared at every call::

    if self.weight.requires_grad: ...  ->  GradientsPlace([layer])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from turbotx.capture.module_state.attribute_methods import active
from turbotx.capture.module_state.places import StatePlace
from turbotx.capture.module_state.recorder import StateRecorder
from turbotx.capture.module_state.values import Look


def note_gradients(recorder: StateRecorder, tensor: torch.Tensor) -> bool | None:
    """Note that the traced code asks whether a parameter of the model requires gradients, and
    return it; None for any other tensor."""
    for module in recorder.modules:
        table = object.__getattribute__(module, "__dict__")["_parameters"]
        for name, parameter in table.items():
            if parameter is tensor:
                own = recorder.find_own(module)
                recorder.gradients.append(own)
                return bool(own._parameters[name].requires_grad)
    return None


def require_gradients(module: nn.Module) -> bool:
    """Return whether any parameter of a module requires gradients; noted where it is traced."""
    recorder = getattr(active, "recorder", None)
    parameters = [*module.parameters()]
    if recorder is None:
        return any(p.requires_grad for p in parameters)
    answers = [note_gradients(recorder, p) for p in parameters]  # of every one: all are noted
    return any(answers)


class GradientsPlace(StatePlace):
    """Which parameters of some modules require gradients: no dict tells when that changes."""

    text = "requires_grad of parameters"

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._tables = [m._parameters for m in modules]
        self.key = ("gradients",)

    def read(self) -> Any:
        """Return a bool for each parameter."""
        return [p.requires_grad for t in self._tables for p in t.values() if p is not None]

    def dicts(self) -> list[dict[Any, Any]]:
        """Return the tables of the parameters."""
        return [*self._tables]

    def describe(self, look: Look) -> Any:
        """Return the same; notes that it is to be compared at every call."""
        look.unversioned = True
        return self.read()
