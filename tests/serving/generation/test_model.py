"""A directory becomes a generator: its dtype, its products, its texts."""

from __future__ import annotations

import pytest
import torch

from tests.serving.generation.tiny_decoders import gpt2, is_greedy, tokenizer
from turbotx.serving.generation.model import load_generator


@pytest.mark.parametrize("quantize", ["none", "int8-weights"])
def test_a_directory_generates_with_the_products_asked_for(tmp_path, quantize):
    torch.manual_seed(0)
    gpt2().eval().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    made = load_generator(str(tmp_path), quantize=quantize)
    assert made.dtype == ("float32" if quantize == "none" else "float32-int8-weights")
    with torch.no_grad():
        logits = made.module(torch.tensor([[4, 5, 6]])).logits
        exact = made.model(torch.tensor([[4, 5, 6]])).logits
    assert torch.cosine_similarity(logits, exact, -1).min() > 0.999
    tokens = made.module.generate(torch.tensor([[4, 5, 6]]), max_new_tokens=4, do_sample=False)
    if quantize == "none":
        assert is_greedy(made.model, [4, 5, 6], tokens[0, 3:].tolist())
