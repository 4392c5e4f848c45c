"""Every kernel of real architectures: right in Triton's interpreter, and built for every GPU.

In: transformers with random weights and two layers, tiny for the interpreter, and of their usual
widths for the compilers. Out: differences from the kernels' meaning in float64; spills and the
width of accesses to memory on each target. The sweep adds the architectures not run by default.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.kernel_interpreter import interpret
from tests.kernels.triton.attention_runner import check_attention, check_product
from tests.kernels.triton.triton_runner import TritonRunner
from turbotx import ir
from turbotx.capture.trace import capture
from turbotx.engine.compiled import UnboundProgram
from turbotx.engine.pipeline import compile_captured, jobs
from turbotx.ir.expr import evaluate
from turbotx.kernels.job import Job
from turbotx.kernels.schedule import choose_schedule
from turbotx.kernels.triton.compiler import TARGETS, build
from turbotx.kernels.triton.printer import print_triton
from turbotx.options import Options

transformers = pytest.importorskip("transformers")

MODELS = ("bert", "gpt2", "llama")
FURTHER = (
    "distilbert", "roberta", "albert", "electra", "opt", "t5", "mistral", "qwen2", "vit", "bart",
    "modernbert",
)  # fmt: skip
EVERY = [*MODELS, *(pytest.param(name, marks=pytest.mark.sweep) for name in FURTHER)]
# What configurations call their sizes: width, inner width, heads, layers, and lengths that masks
# and positions need.
NAMES = {
    "width": ("hidden_size", "dim", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim"),
    "inner": ("intermediate_size", "hidden_dim", "d_ff", "n_inner", "ffn_dim", "encoder_ffn_dim"),
    "heads": ("num_attention_heads", "n_heads", "n_head", "num_heads", "encoder_attention_heads"),
    "layers": ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers"),
    "window": ("sliding_window", "local_attention"),
    "length": ("max_position_embeddings", "n_positions"),
    "vocabulary": ("vocab_size",),
}


def make_model(name: str, width: int) -> torch.nn.Module:
    """A model of two layers in evaluation mode; of those that also decode, the encoder."""
    config = transformers.AutoConfig.for_model(name)
    heads = max(2, width // 64)
    sizes = {
        "width": width, "inner": 2 * width if width < 64 else 4 * width, "heads": heads,
        "layers": 2, "window": 4, "length": 64, "vocabulary": 64,
    }  # fmt: skip
    for size, names in NAMES.items():
        for attribute in names:
            if attribute in config.to_dict():
                setattr(config, attribute, sizes[size])
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = max(1, heads // 2)
    if name in ("mistral", "qwen2"):
        config.use_sliding_window, config.layer_types = True, ["sliding_attention"] * 2
    if name == "t5":
        config.d_kv = width // heads
    if name == "vit":
        config.image_size, config.patch_size = 12, 4
    if name == "modernbert":
        config.layer_types = ["full_attention", "sliding_attention"]
    for token in ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id"):
        if getattr(config, token, None) is not None:
            setattr(config, token, 1)
    config.use_cache = False
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config)
    return (model.get_encoder() if config.is_encoder_decoder else model).eval()


def make_call(name: str) -> dict[str, Any]:
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 12, 12)}
    return {
        "input_ids": torch.ones(2, 7, dtype=torch.long),
        "attention_mask": torch.ones(2, 7, dtype=torch.long),
    }


def compiled(
    name: str, width: int, target: str, dtype: torch.dtype = torch.float32, way: str = "auto"
) -> UnboundProgram:
    """A model whose GEMMs are the library's, so that kernels do all the rest."""
    given = make_call(name)
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in given.items()}
    captured = capture(make_model(name, width).to(dtype), (), inputs)
    return compile_captured(captured, Options(attention=way, gemms="cublas"), target)


@functools.cache
def launches_of(name: str, width: int, way: str = "auto") -> list[ir.Launch]:
    (program,) = compiled(name, width, "sm_90", way=way).specializations
    return program.assembled.assembly.launches


def kernels_of(name: str, width: int) -> list[ir.Kernel]:
    found = {x.kernel.digest(): x.kernel for x in launches_of(name, width)
             if isinstance(x, ir.KernelLaunch)}  # fmt: skip
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


@pytest.mark.parametrize("name", EVERY)
def test_every_kernel_is_right_in_the_interpreter(name: str) -> None:
    for kernel in kernels_of(name, 16):
        dims = {n: 3 if n == "seq" else 2 for n in kernel.sizes}
        dims = {"batch": 2, "seq": 3, "attention_mask_d0": 2} | dims
        given = make_inputs(kernel, dims)
        chosen = choose_schedule(kernel, dims)
        if kernel.columns:  # the interpreter combines 5000 elements a second
            chosen = dataclasses.replace(chosen, rows=2)
        got = TritonRunner(chosen)(kernel, given, dims)
        exact = interpret(kernel, given, dims)
        for key, value in got.items():
            error = (value.double() - exact[key].double()).abs().max()
            assert error <= 4e-6 * exact[key].double().abs().max().clamp(min=1), kernel.name


@pytest.mark.parametrize("way", ["flash", "fused-softmax"])
@pytest.mark.parametrize("name", EVERY)
def test_every_attention_is_right_in_the_interpreter(name: str, way: str) -> None:
    launches = launches_of(name, 16, way)
    attentions = {x.kernel for x in launches if isinstance(x, ir.AttentionLaunch)}
    products = {x.kernel for x in launches if isinstance(x, ir.ProductLaunch)}
    assert len(products) == (2 if way == "fused-softmax" else 0)
    assert bool(attentions) == (way == "flash")
    for kernel in attentions:
        check_attention(kernel)
    for product in products:
        check_product(product)


def jobs_of_model(
    name: str, width: int, dtype: torch.dtype, targets: Iterable[str], way: str = "auto"
) -> list[tuple[Job, bool]]:
    """What the launches of a model compile for two rows of 128, and whether it reads much."""
    made: dict[object, tuple[Job, bool]] = {}
    for target in targets:
        program = compiled(name, width, target, dtype, way)
        names = program.call.captured.dims
        dims = {n: 2 if n == "batch" or n.endswith("_d0") else 128 for n in names}
        for x in jobs(program, tuple(dims.values())):
            kernel = x.launch.kernel if isinstance(x.launch, ir.KernelLaunch) else None
            much = kernel is None or reads_much(kernel, x.job, dims)
            made.setdefault(x.job.digest(), (x.job, much))
    return list(made.values())


def reads_much(kernel: ir.Kernel, job: Job, dims: Mapping[str, int]) -> bool:
    """Tell whether some tensor of floats has 16 bytes for every thread of a program."""
    sizes = [evaluate(p.nbytes, dims) for p in kernel.params
             if p.role == "in" and p.dtype.is_floating_point]  # fmt: skip
    return max(sizes, default=0) >= 16 * 32 * job.num_warps


def check_built(jobs: list[tuple[Job, bool]]) -> None:
    """No spills; 128 bits at a time where a kernel reads floats that lie side by side."""
    for b, (_, much) in zip(build([job for job, _ in jobs]), jobs, strict=True):
        what = f"{b.job.name} for {b.job.target}: {b.resources}"
        assert b.resources.spills == 0, what
        assert b.resources.load_bits >= 128 or not much, what


def test_bert_builds_for_one_target() -> None:
    check_built(jobs_of_model("bert", 32, torch.float32, ["sm_90"]))


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_usual_widths_build_for_every_target(target: str, dtype: torch.dtype) -> None:
    """All models at once: most of their kernels are equal, and are built once."""
    made = {
        job.digest(): (job, much)
        for name in (*MODELS, *FURTHER)
        for job, much in jobs_of_model(
            name, {"bert": 384, "llama": 1024}.get(name, 768), dtype, [target]
        )
    }
    check_built(list(made.values()))


@pytest.mark.sweep
@pytest.mark.parametrize("name", MODELS)
def test_the_papers_way_builds_for_every_target(name: str) -> None:
    check_built(jobs_of_model(name, 768, torch.float16, TARGETS, "fused-softmax"))


@pytest.mark.parametrize("name", MODELS)
def test_any_stream_of_shapes_needs_a_handful_of_builds(name: str) -> None:
    for kernel in kernels_of(name, 16):
        sources = Counter()
        for seq in range(1, 600, 7):
            dims = {n: seq if n == "seq" else 3 for n in ("batch", "seq", "attention_mask_d0")}
            sources[print_triton(kernel, choose_schedule(kernel, dims))] += 1
        assert len(sources) <= 3, f"{kernel.name}: {len(sources)}"
