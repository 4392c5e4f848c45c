"""Packed call: run concatenated sequences, lists of sequences or nested tensors without padding.

In: an engine with padding="packed", and each model input with one row per token. Out: the model's
output with (tokens, ...) in place of (batch, seq, ...), or nested or a list like the inputs::

    fast.packed(input_ids=flat, lengths=[5, 500, 17]).last_hidden_state   # (522, 384)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from turbotx.capture.refusals import refuse_gradient
from turbotx.engine.engine import Engine
from turbotx.errors import InputError
from turbotx.runtime.packed_program import PackedProgram
from turbotx.runtime.token_inputs import StandIns, read_sequences, run_sequences

_kept: WeakKeyDictionary[Engine, StandIns] = WeakKeyDictionary()


def call_packed(
    engine: Engine, lengths: Sequence[int] | torch.Tensor | None, longest: int | None,
    given: Mapping[str, Any],
) -> Any:  # fmt: skip
    """Run a call whose inputs have one row per token, equivalent to the right-padded call.

    lengths: of the sequences, for flat inputs (tokens, ...).
    longest: an upper bound of the lengths; with it, lengths on a GPU need no synchronization.
    Raises InputError if inputs do not fit together, or if the model reads the last column, which is
    padding in a padded call; PackError if its graph mixes tokens of different sequences.
    """
    if engine.options.padding != "packed":
        raise InputError('packed() is of a module that was made by optimize(padding="packed")')
    found = read_sequences(lengths, longest, given)
    if torch.is_grad_enabled() and any(t.requires_grad for t in found.rows.values()):
        refuse_gradient()
    padded = _kept.get(engine) or StandIns()
    standing, by_token = padded.make(found)

    def run(program: Any, binding: Any, tensors: Any, watch: Any) -> Any:
        assert isinstance(program, PackedProgram)
        if program.takes_any_sizes:
            _kept[engine] = padded
        name = type(engine.model).__name__
        return run_sequences(program, binding.dims, found, tensors, by_token, name)

    variant, leaves = engine.run_flat((), standing, run)
    return variant.build_output(leaves)
