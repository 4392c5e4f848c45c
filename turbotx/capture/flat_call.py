"""Flat call: wraps a model's call in a module with tensor inputs and outputs, for torch.export.

In: a model, the leaves of a call's arguments and their structure. Out: a module that takes the
tensor leaves and returns the leaves of the output, then the call's effects::

    FlatCall(bert, leaves, spec, recorder)(ids, mask)  ->  [last_hidden_state, pooler_output]
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from turbotx.capture.arguments import Structure, is_float, rebuild
from turbotx.capture.caught_errors import CaughtErrors
from turbotx.capture.composition import calls_forward
from turbotx.capture.equal_layers.layers import EqualLayers
from turbotx.capture.expanded_inputs import ExpandedInputs
from turbotx.capture.layout_questions import LayoutQuestions
from turbotx.capture.module_state.gradients import note_gradients
from turbotx.capture.module_state.recorder import StateRecorder
from turbotx.capture.replaced_calls import ReplacedCalls
from turbotx.capture.returned import take_apart
from turbotx.capture.returned_arguments import PassedArguments
from turbotx.capture.sandbox.sandbox import Sandbox
from turbotx.capture.tensor_attributes import TensorAttributes
from turbotx.capture.trace_errors import Stopped
from turbotx.capture.traced_float import FloatInput, FloatReads, read_floats
from turbotx.capture.value_questions import ValueQuestions
from turbotx.errors import CaptureError
from turbotx.ir.memory_order import in_memory, inverse, memory_order


class FlatCall(nn.Module):
    """The model's sandboxed copy behind a flat signature: input tensors in their memory order;
    outputs: the output's leaves, then the call's effects, then the values that conditions read."""

    def __init__(
        self, model: nn.Module, leaves: Sequence[Any], spec: Structure, recorder: StateRecorder,
        values: ValueQuestions, expanded: ExpandedInputs,
    ) -> None:  # fmt: skip
        super().__init__()
        # A separate object, because tracing undoes changes to a module.
        self.seen = Sandbox(model)
        self.model, self.recorder = self.seen.model, recorder
        recorder.modules = list(self.model.modules())
        recorder.original_of, recorder.follows = self.seen.original_of, self.seen.follows
        self.seen.keeps = recorder.note_kept
        self.constants = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.positions = [
            i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) or is_float(x)
        ]
        carried = (leaves[i] for i in self.positions)
        self.orders = [memory_order(x) if isinstance(x, torch.Tensor) else None for x in carried]
        self.floats, self.expanded = FloatReads(), expanded
        self.layouts, self.values = LayoutQuestions(partial(note_gradients, recorder)), values
        self.attributes = TensorAttributes()
        self.layers = EqualLayers(self.seen.model, recorder, self._look_around)
        self.calls_forward = calls_forward(model)
        self.in_spec = spec
        self.given = ""  # a description of the arguments, for messages
        self.training = False

    def forward(self, *tensors: torch.Tensor) -> list[Any]:
        """Call the model with the tensors and return the leaves of its output.

        Raises Stopped around any exception of the model's code.
        """
        leaves: list[Any] = [copy.copy(x) if isinstance(x, set) else x for x in self.constants]
        self.floats.begin()
        self.layouts.begin(tensors)
        self.values.begin()
        self.layers.begin()
        self.attributes.written.clear()
        given = self.expanded.expand(
            [in_memory(t, inverse(o)) for t, o in zip(tensors, self.orders, strict=True)]
        )
        for k, (position, tensor) in enumerate(zip(self.positions, given, strict=True)):
            number = leaves[position]
            leaves[position] = tensor if number is None else self.floats.make(number, tensor, k)
        args, kwargs = rebuild(leaves, self.in_spec)
        model = self.model
        try:
            passed = PassedArguments(args, kwargs)
            self.seen.begin(given)
            with (
                self.recorder.on(tensors), ReplacedCalls() as replaced, self.layouts,
                CaughtErrors() as caught, self.values,
            ):  # fmt: skip
                # Hooks of the model itself are skipped: they run around the program.
                called = model.forward if self.calls_forward else model
                output = called(*args, **kwargs)
            caught.finish()
            self.seen.returned, lost = passed.find_returned(output)
            _refuse_changes(lost)
            flat, self.seen.out_spec, self.seen.constants = take_apart(output, type(model).__name__)
            results = [*map(read_floats, flat), *self.seen.finish(), *self.values.finish()]
            replaced.finish(results)
            owned = itertools.chain(model.parameters(), model.buffers())
            self.attributes.refuse_lost((*given, *owned, *results))
            return results
        except Exception as error:
            raise Stopped(error) from error
        finally:
            self.layers.finish()

    def _look_around(self) -> tuple[Any, Any]:
        """Return what the model's code may leave behind, as it is now, and what keeps it alive."""
        written, kept = self.seen.look_around()
        asked = dict(self.layouts.asked), set(self.layouts.sizes)
        return (written, asked, self.values.count), kept

    def describe_floats(self) -> tuple[FloatInput, ...]:
        """Return every float of the call, with what the trace assumed of it."""
        numbers = [(k, self.constants[i]) for k, i in enumerate(self.positions)]
        return tuple(self.floats.describe(k, x) for k, x in numbers if x is not None)


def _refuse_changes(changed: Sequence[str]) -> None:
    if changed:
        raise CaptureError(
            f"it changes its argument {', '.join(changed)} (an attribute, an entry or an item), "
            "which a program cannot do for the caller: return the new value instead"
        )
