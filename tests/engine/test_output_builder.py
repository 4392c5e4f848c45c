"""Outputs are built as pytree builds them, at every call."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from turbotx.engine.output_builder import OutputBuilder, is_plain_model_output

transformers = pytest.importorskip("transformers")
from transformers.modeling_outputs import (  # noqa: E402
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    Seq2SeqModelOutput,
)


def tensors(count: int) -> list[torch.Tensor]:
    return [torch.full((2,), float(k)) for k in range(count)]


def same(a: Any, b: Any) -> bool:
    """Compare two outputs, by identity of what they hold."""
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if type(a) is dict:
        return list(a) == list(b) and all(map(same, a.values(), b.values()))
    if isinstance(a, OrderedDict):
        ours, theirs = list(OrderedDict.items(a)), list(OrderedDict.items(b))
        names = [n for n, _ in ours] == [n for n, _ in theirs]
        held = all(same(x, y) for (_, x), (_, y) in zip(ours, theirs, strict=True))
        attributes = list(vars(a)) == list(vars(b))
        return type(a) is type(b) and names and held and attributes and all(
            same(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
        )  # fmt: skip
    return a is b


x = tensors(9)
OUTPUTS = {
    "tensor": x[0],
    "tuple": (x[0], [x[1], (x[2],)]),
    "pooled": BaseModelOutputWithPooling(last_hidden_state=x[0], pooler_output=x[1]),
    "one field": BaseModelOutputWithPooling(last_hidden_state=x[0]),
    "layers": CausalLMOutputWithPast(logits=x[0], hidden_states=(x[1], x[2]), attentions=(x[3],)),
    "encoder": Seq2SeqModelOutput(last_hidden_state=x[0], encoder_last_hidden_state=x[4]),
    "inside of a tuple": (BaseModelOutputWithPooling(last_hidden_state=x[0]), x[1]),
    "inside of a dict": {"out": BaseModelOutputWithPooling(last_hidden_state=x[0]), "more": x[1]},
}


@pytest.mark.parametrize("which", OUTPUTS)
def test_outputs_are_as_pytree_makes_them(which: str) -> None:
    leaves, spec = pytree.tree_flatten(OUTPUTS[which])
    build = OutputBuilder(spec)
    for call in range(3):
        given = tensors(len(leaves)) if call else leaves
        assert same(build(given), pytree.tree_unflatten(given, spec))


def test_what_is_made_works_as_transformers_own() -> None:
    leaves, spec = pytree.tree_flatten(OUTPUTS["pooled"])
    build = OutputBuilder(spec)
    build(leaves)
    made = build(leaves)
    assert made.last_hidden_state is leaves[0] and made["pooler_output"] is leaves[1]
    assert made.hidden_states is None and made[0] is leaves[0] and "hidden_states" not in made
    made.hidden_states = (x[5],)
    assert made["hidden_states"][0] is x[5] and len(made.to_tuple()) == 3
    assert build(leaves).hidden_states is None  # no two share anything


def test_one_leaf_twice_is_left_to_pytree() -> None:
    leaves, spec = pytree.tree_flatten(OUTPUTS["pooled"])
    build = OutputBuilder(spec)
    build([leaves[0], leaves[0]])
    made = build(leaves)
    assert made.last_hidden_state is leaves[0] and made.pooler_output is leaves[1]


def test_classes_that_do_more_are_left_to_pytree() -> None:
    @dataclass
    class Counting(BaseModelOutputWithPooling):
        made = 0

        def __post_init__(self) -> None:
            type(self).made += 1
            super().__post_init__()

    assert is_plain_model_output(BaseModelOutputWithPooling)
    assert not is_plain_model_output(Counting)
    assert not is_plain_model_output(OrderedDict) and not is_plain_model_output(None)
    leaves, spec = pytree.tree_flatten(Counting(last_hidden_state=x[0]))
    build = OutputBuilder(spec)
    for _ in range(2):
        build(leaves)
    assert Counting.made == 3
