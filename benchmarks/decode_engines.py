"""Engines of a decode step: each a function of a batch and a past that gives milliseconds a step.

In: a causal model of transformers. Out: `ENGINES`, name to maker; a maker raises if its engine is
not installed or does not take the model. Times are process CPU milliseconds: of the prompt, which
gives the first token, and of each step::

    run = ENGINES["openvino"](model, folder)
    run(ids, 24)  ->  410.7, [41.2, 33.9, 33.8, ...]      # ids: (batch, past); 24 steps
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import turbotx
from turbotx.cli.bench.peers import compile_frozen, convert_to_ctranslate2

Times = tuple[float, list[float]]
Run = Callable[[torch.Tensor, int], Times]


def time_steps(step: Callable[[torch.Tensor], Any], ids: torch.Tensor, count: int) -> Times:
    """Return the milliseconds of the prompt, and of each of `count` calls with one more token per
    sequence."""
    times = []
    for token in (ids, *torch.randint(0, 1000, (count, len(ids), 1))):
        begin = time.process_time()
        step(token)
        times.append((time.process_time() - begin) * 1e3)
    return times[0], times[1:]


def _run_transformers(model: Any, make_cache: Callable[[int, int], Any]) -> Run:
    def run(ids: torch.Tensor, count: int) -> Times:
        cache = make_cache(len(ids), ids.shape[1] + count)

        def step(token: torch.Tensor) -> None:
            model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)

        return time_steps(step, ids, count)

    return run


def make_turbotx(model: Any, folder: Path, **options: Any) -> Run:
    from transformers import DynamicCache

    fast = turbotx.optimize(model, **options)
    return _run_transformers(fast, lambda batch, length: DynamicCache(config=model.config))


def make_eager(model: Any, folder: Path) -> Run:
    from transformers import DynamicCache

    return _run_transformers(model, lambda batch, length: DynamicCache(config=model.config))


def make_compiled(model: Any, folder: Path) -> Run:
    """torch.compile over a static cache of just the length that is needed, weights frozen."""
    from transformers import StaticCache

    compiled = compile_frozen(model, dynamic=False)

    def make_cache(batch: int, length: int) -> Any:
        return StaticCache(config=model.config, max_cache_len=length)

    return _run_transformers(compiled, make_cache)


class _Step(torch.nn.Module):
    """A model's step with its cache as tensors in and out, chosen by `beam_idx`: the form in which
    OpenVINO finds a cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, beam_idx: torch.Tensor, *past: torch.Tensor) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        chosen = [x.index_select(0, beam_idx) for x in past]
        for layer, keys, values in zip(cache.layers, chosen[::2], chosen[1::2], strict=True):
            layer.keys, layer.values = keys, values
            layer.dtype, layer.device = keys.dtype, keys.device
            layer.is_initialized = True
        found = self.model(
            input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        return (found, *(x for layer in cache.layers for x in (layer.keys, layer.values)))


def make_openvino(model: Any, folder: Path) -> Run:
    """OpenVINO with the cache as its own state; a bfloat16 model is converted in float32 and run in
    bfloat16 by a hint."""
    openvino = importlib.import_module("openvino")
    tool = importlib.import_module("openvino._offline_transformations")
    narrow = model.dtype is torch.bfloat16
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = config.hidden_size // config.num_attention_heads
    past = [torch.randn(2, heads, 3, width) for _ in range(2 * config.num_hidden_layers)]
    example = (torch.ones(2, 2, dtype=torch.long), torch.arange(2), *past)
    converted = openvino.convert_model(_Step(model.float()), example_input=example)
    names = ["ids", "beam_idx", *(f"past_{k}" for k in range(len(past)))]
    for name, port in zip(names, converted.inputs, strict=True):
        port.get_tensor().set_names({name})
    for k, port in enumerate(converted.outputs[1:]):
        port.get_tensor().set_names({f"present_{k}"})
    sizes = [[-1, -1], [-1], *([-1, heads, -1, width] for _ in past)]
    shapes = (openvino.PartialShape(size) for size in sizes)
    converted.reshape(dict(zip(converted.inputs, shapes, strict=True)))
    states = {f"past_{k}": f"present_{k}" for k in range(len(past))}
    tool.apply_make_stateful_transformation(converted, states)
    compiled = openvino.Core().compile_model(converted, "CPU", {
        "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if narrow else "f32",
    })  # fmt: skip
    request = compiled.create_infer_request()

    def run(ids: torch.Tensor, count: int) -> Times:
        request.reset_state()
        chosen = torch.arange(len(ids)).numpy()

        def step(token: torch.Tensor) -> Any:
            return request.infer([token.numpy(), chosen], share_inputs=True, share_outputs=True)

        return time_steps(step, ids, count)

    return run


def make_ctranslate2(model: Any, folder: Path, int8: bool = False) -> Run:
    """CTranslate2's own greedy loop; a step is what `count` further tokens take, by their number:
    it has no call for one step. int8: of weights and of what is multiplied by them."""
    ctranslate2 = importlib.import_module("ctranslate2")
    kind = "int8_" * int8 + str(model.dtype).removeprefix("torch.")
    generator = ctranslate2.Generator(
        convert_to_ctranslate2(model, folder), device="cpu", compute_type=kind,
        inter_threads=1, intra_threads=torch.get_num_threads(),
    )  # fmt: skip

    def generate(ids: torch.Tensor, count: int) -> tuple[float, list[int]]:
        prompts = [[f"<{k}>" for k in row] for row in ids.tolist()]
        begin = time.process_time()
        found = generator.generate_batch(
            prompts, max_length=count, min_length=count, sampling_topk=1, end_token=[],
            include_prompt_in_result=False, max_batch_size=len(ids),
        )  # fmt: skip
        ended = time.process_time()
        made = {len(x.sequences_ids[0]) for x in found}
        if made != {count}:
            raise RuntimeError(f"CTranslate2 made {made} tokens, not {count}")
        return (ended - begin) * 1e3, [x.sequences_ids[0][0] for x in found]

    ids = torch.arange(16).view(1, 16)
    wanted = model(input_ids=ids).logits[:, -1].argmax(-1).tolist()
    if not int8 and generate(ids, 1)[1] != wanted:
        raise RuntimeError("CTranslate2 goes on otherwise than the model")

    def run(ids: torch.Tensor, count: int) -> Times:
        first = min(generate(ids, 1)[0] for _ in range(2))
        return first, [(generate(ids, count + 1)[0] - first) / count] * count

    return run


ENGINES: dict[str, Callable[[Any, Path], Run]] = {
    "turbotx": make_turbotx,
    "eager": make_eager,
    "compile-static": make_compiled,
    "openvino": make_openvino,
    "ctranslate2": make_ctranslate2,
    "turbotx-int8-weights": partial(make_turbotx, quantize="int8-weights"),
    "turbotx-int8-weights-head": partial(make_turbotx, quantize="int8-weights", keep_float=()),
    "turbotx-int4-weights": partial(make_turbotx, quantize="int4-weights"),
    "ctranslate2-int8": partial(make_ctranslate2, int8=True),
}
