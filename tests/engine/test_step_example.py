"""Step example: tensors with a role get sizes that no two of a call share; others stay."""

from __future__ import annotations

import torch

from turbotx.engine.step_example import SIZES, make_example


def call(**more):
    return {
        "input_ids": torch.arange(5)[None], "attention_mask": torch.ones(1, 33), "use_cache": True,
        "kv_memory": torch.zeros(8, 1, 64), "kv_length": torch.empty(33, 0), "kv_kind": "decoder",
        **more,
    }  # fmt: skip


def shapes(example):
    return {k: tuple(v.shape) for k, v in example.items() if isinstance(v, torch.Tensor)}


def test_sizes_differ_from_each_other_and_from_1() -> None:
    assert len(set(SIZES.values())) == len(SIZES) and min(SIZES.values()) > 1
    found = shapes(make_example(call(scores=torch.ones(4, 1), inputs_embeds=None)))
    assert found == {
        "input_ids": (2, 3), "attention_mask": (2, 7), "kv_memory": (13, 2, 11),
        "kv_length": (7, 0), "scores": (4, 1),
    }  # fmt: skip


def test_values_are_those_of_the_call() -> None:
    ids = make_example(call())["input_ids"]
    assert ids.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_a_whole_mask_has_two_lengths() -> None:
    found = shapes(make_example(call(attention_mask=torch.ones(1, 1, 5, 33))))
    assert found["attention_mask"] == (2, 1, 3, 7)


def test_there_are_as_many_tokens_as_logits_are_kept() -> None:
    found = shapes(make_example(call(logits_to_keep=4)))
    assert found["input_ids"] == (2, 6) and found["kv_length"] == (10, 0)
    assert found["kv_memory"] == (13, 2, 14)


def test_an_encoders_tokens_have_a_length_of_their_own() -> None:
    mask = torch.ones(1, 9)
    found = shapes(
        make_example(
            {
                "decoder_input_ids": torch.ones(1, 1), "attention_mask": mask, "kv_kind": "further",
                "kv_cross": torch.ones(4, 1, 2, 9, 8), "decoder_attention_mask": mask,
                "kv_encoded": torch.ones(1, 9, 6),
            }
        )
    )  # fmt: skip
    assert found == {
        "decoder_input_ids": (2, 3), "attention_mask": (2, 5), "kv_cross": (4, 2, 2, 5, 8),
        "decoder_attention_mask": (2, 7), "kv_encoded": (2, 5, 6),
    }  # fmt: skip
