"""Every kernel of real architectures: right in Triton's interpreter, and built for every GPU.

In: BERT, GPT-2 and Llama with random weights and two layers, tiny for the interpreter, and of
their usual widths for the compilers. Out: differences from the kernels' meaning in float64; spills
and the width of accesses to memory on each target.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.kernel_interpreter import interpret
from tests.kernels.triton_runner import TritonRunner
from turbotx import ir
from turbotx.assemble import assemble
from turbotx.capture import capture
from turbotx.kernels.cpp_attention import AttentionKernel
from turbotx.kernels.fuse import fuse_all
from turbotx.kernels.schedule import choose_schedule, divisible_sizes
from turbotx.kernels.targets import TARGETS, Job, attention_job, build, kernel_job
from turbotx.kernels.triton_printer import print_triton
from turbotx.passes.partition import find_prepared, partition
from turbotx.pipeline import rewrite
from turbotx.sizes import evaluate

transformers = pytest.importorskip("transformers")

MODELS = ("bert", "gpt2", "llama")


def make_model(name: str, width: int) -> torch.nn.Module:
    heads, inner = max(2, width // 64), 2 * width if width < 64 else 4 * width
    torch.manual_seed(0)
    if name == "bert":
        config = transformers.BertConfig(
            hidden_size=width, num_hidden_layers=2, num_attention_heads=heads,
            intermediate_size=inner, vocab_size=50, max_position_embeddings=64,
        )  # fmt: skip
        return transformers.BertModel(config).eval()
    if name == "gpt2":
        config = transformers.GPT2Config(
            n_embd=width, n_layer=2, n_head=heads, n_inner=inner, vocab_size=50, n_positions=64,
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return transformers.GPT2Model(config).eval()
    config = transformers.LlamaConfig(
        hidden_size=width, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2), intermediate_size=inner, vocab_size=50,
    )  # fmt: skip
    return transformers.LlamaModel(config).eval()


@functools.cache
def launches_of(name: str, width: int, dtype: torch.dtype = torch.float32) -> list[ir.Launch]:
    inputs: dict[str, Any] = {"input_ids": torch.ones(2, 7, dtype=torch.long)}
    inputs["attention_mask"] = torch.ones(2, 7, dtype=torch.long)
    if name != "bert":
        inputs["use_cache"] = False
    captured = capture(make_model(name, width).to(dtype), (), inputs)
    graph = captured.graph_module.graph
    rewrite(graph)
    prepared = find_prepared(graph)
    fused = fuse_all(graph, partition(graph, prepared), prepared)
    return assemble(graph, fused, prepared, captured.dims).launches


def kernels_of(name: str, width: int, dtype: torch.dtype = torch.float32) -> list[ir.Kernel]:
    found = {x.target.digest(): x.target for x in launches_of(name, width, dtype)
             if isinstance(x.target, ir.Kernel)}  # fmt: skip
    return list(found.values())


def make_inputs(kernel: ir.Kernel, dims: dict[str, int]) -> dict[str, torch.Tensor]:
    """Random floats and masks; whole numbers that are indices of any table."""
    made = {}
    for p in kernel.params:
        shape = [evaluate(e, dims) for e in p.shape]
        if p.dtype.is_floating_point:
            made[p.name] = torch.randn(shape).to(p.dtype)
        else:
            made[p.name] = torch.randint(0, 2, shape).to(p.dtype)
    return {p.name: made[p.name] for p in kernel.params if p.role == "in"}


@pytest.mark.parametrize("name", MODELS)
def test_every_kernel_is_right_in_the_interpreter(name: str) -> None:
    for kernel in kernels_of(name, 16):
        dims = {n: 3 if n == "seq" else 2 for n in kernel.sizes}
        given = make_inputs(kernel, {"batch": 2, "seq": 3, **dims, "attention_mask_d0": 2})
        dims = {"batch": 2, "seq": 3, "attention_mask_d0": 2} | dims
        chosen = choose_schedule(kernel, dims)
        if kernel.columns:  # the interpreter combines 5000 elements a second
            chosen = dataclasses.replace(chosen, rows=2)
        got = TritonRunner(chosen)(kernel, given, dims)
        exact = interpret(kernel, given, dims)
        for key, value in got.items():
            error = (value.double() - exact[key].double()).abs().max()
            assert error <= 4e-6 * exact[key].double().abs().max().clamp(min=1), kernel.name


def jobs_of(name: str, width: int, dtype: torch.dtype, target: str) -> list[Job]:
    jobs = [
        kernel_job(k, target, divisible=divisible_sizes(k)) for k in kernels_of(name, width, dtype)
    ]
    attentions = {x.target for x in launches_of(name, width, dtype)
                  if isinstance(x.target, AttentionKernel)}  # fmt: skip
    return jobs + [attention_job(a, target, key_mask=True) for a in attentions]


def check_built(jobs: list[Job]) -> None:
    """No spills; 128 bits at a time where a kernel works on floats that lie side by side."""
    for b in build(jobs):
        assert b.resources.spills == 0, f"{b.job.name} for {b.job.target}: {b.resources}"
        if "_to_copy_arange" in b.job.name and "layer_norm" not in b.job.name:
            continue  # booleans made from one mask: as narrow as their source allows
        assert b.resources.load_bits >= 128, f"{b.job.name} for {b.job.target}: {b.resources}"


def test_bert_builds_for_one_target() -> None:
    check_built(jobs_of("bert", 16, torch.float32, "sm_90"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_usual_widths_build_for_every_target(name: str, dtype: torch.dtype) -> None:
    width = {"bert": 384, "gpt2": 768, "llama": 1024}[name]
    check_built([job for target in TARGETS for job in jobs_of(name, width, dtype, target)])


@pytest.mark.parametrize("name", MODELS)
def test_any_stream_of_shapes_needs_a_handful_of_builds(name: str) -> None:
    for kernel in kernels_of(name, 16):
        sources = Counter()
        for seq in range(1, 600, 7):
            dims = {n: seq if n == "seq" else 3 for n in ("batch", "seq", "attention_mask_d0")}
            sources[print_triton(kernel, choose_schedule(kernel, dims))] += 1
        assert len(sources) <= 3, f"{kernel.name}: {len(sources)}"
