"""Packed call: sequences one behind the other, lists of them or nested tensors, without padding.

In: an engine of padding="packed", and for each input of the model its rows by token. Out: the
model's own output with (tokens, ...) in the place of (batch, seq, ...), or nested or listed as the
inputs were::

    fast.packed(input_ids=flat, lengths=[5, 500, 17]).last_hidden_state   # (522, 384)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from turbotx.capture.refusals import refuse_gradient
from turbotx.engine.engine import MOST_CHANGES, Engine
from turbotx.errors import CaptureError, InputError, ModelChangedError
from turbotx.runtime.packed_program import PackedProgram
from turbotx.runtime.token_inputs import read_sequences, run_sequences, stand_in


def call_packed(
    engine: Engine, lengths: Sequence[int] | torch.Tensor | None, longest: int | None,
    given: Mapping[str, Any],
) -> Any:  # fmt: skip
    """Run a call whose inputs have a row a token: what each would have in the padded call whose
    sequences are filled up on the right.

    lengths: of the sequences, for flat inputs (tokens, ...). longest: what none of them exceeds;
    with it, lengths on a GPU are not waited for. Raises InputError where inputs do not
    fit together, or the model looks at the last column, which a padded call fills up; PackError
    where its graph does not keep tokens apart.
    """
    if engine.options.padding != "packed":
        raise InputError('packed() is of a module that was made by optimize(padding="packed")')
    found = read_sequences(lengths, longest, given)
    if torch.is_grad_enabled() and any(t.requires_grad for t in found.rows.values()):
        refuse_gradient()
    name = type(engine.model).__name__
    for _ in range(MOST_CHANGES):
        standing, by_token = stand_in(found)
        variant, program, binding, tensors = engine.check((), standing)
        assert isinstance(program, PackedProgram)
        try:
            leaves = run_sequences(program, binding.dims, found, tensors, by_token, name)
        except ModelChangedError as error:
            engine._forget(variant, error)
            continue
        return pytree.tree_unflatten(leaves, variant.out_spec)
    raise CaptureError(f"{name} is converted while it is called")
