"""The models that `gpu.py` measures, their inputs, and what they are measured against.

In: a name such as "bert-base", a dtype, an engine. Out: random weights on the device, and a call::

    call = make_call("compile-reduce-overhead", model, inputs)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from gpu_plans import DRY
from gpu_timing import DEVICE
from torch import nn

import turbotx

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
SHAPES = [(1, 16), (1, 40), (1, 128), (1, 384), (1, 512), (20, 128), (32, 128)]
ENGINES = (
    "turbotx", "eager", "eager-graphs", "compile", "compile-reduce-overhead",
    "compile-max-autotune",
)  # fmt: skip
# turbotx with one thing changed, beside the default.
VARIANTS: dict[str, dict[str, Any]] = {
    "turbotx-triton": {"gemms": "triton"},
    "turbotx-cublas": {"gemms": "cublas"},
    "turbotx-no-epilogues": {"epilogues": False},
    "turbotx-no-pdl": {"pdl": False},
    "turbotx-fold": {"norms": "fold"},
    "turbotx-store": {"norms": "store"},
}
COMPILE_MODES = {
    "compile": "default",
    "compile-reduce-overhead": "reduce-overhead",
    "compile-max-autotune": "max-autotune",
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base": ("bert", {}),
    "bert-large": (
        "bert",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
         "intermediate_size": 4096},
    ),
    "minilm": (
        "bert",
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
         "intermediate_size": 1536},
    ),
    "albert": (
        "albert",
        {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    ),
    "distilbert": ("distilbert", {}),
    "gpt2": ("gpt2", {"use_cache": False}),
    "vit-base": ("vit", {}),
}  # fmt: skip
# Of norms that the others do not have.
NORM_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8, "intermediate_size": 8192, "use_cache": False},
    ),
}  # fmt: skip
FACTOR, ULPS = 1.5, 2


def make_model(name: str, dtype: torch.dtype, layers: int | None = None) -> nn.Module:
    """A random model on the device, in evaluation mode, cut to `layers` where that is given."""
    import transformers

    kind, changed = (MODELS | NORM_MODELS)[name]
    config = transformers.AutoConfig.for_model(kind, **changed)
    layers = min(2, layers or 2) if DRY else layers
    for field in ("num_hidden_layers", "n_layers", "n_layer"):
        if layers is not None and hasattr(config, field):
            setattr(config, field, layers)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = transformers.AutoModel.from_config(config)
    return model.to(dtype).eval()


def make_inputs(
    model: nn.Module, batch: int, seq: int, dtype: torch.dtype, padded: bool = False
) -> dict[str, torch.Tensor]:
    """Random ids and a mask (with `padded`, every second row is half as long), or pixels."""
    if getattr(model.config, "image_size", None):
        side = model.config.image_size
        return {"pixel_values": torch.randn(batch, 3, side, side, dtype=dtype, device=DEVICE)}
    ids = torch.randint(3, 1000, (batch, seq), device=DEVICE)
    mask = torch.ones_like(ids)
    if padded:
        mask[1::2, max(1, seq // 2) :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def make_call(engine: str, model: nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """Return one call of a model by an engine, ready to be timed."""
    if engine.startswith("turbotx"):
        return partial(turbotx.optimize(model, **VARIANTS.get(engine, {})), **inputs)
    if engine == "eager":
        return lambda: run_plainly(model, inputs)
    if engine == "eager-graphs":
        return _graphed(model, inputs)
    if DRY:
        return lambda: run_plainly(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, mode=COMPILE_MODES[engine], dynamic=False)

    def call() -> Any:
        if engine != "compile":
            torch.compiler.cudagraph_mark_step_begin()
        return run_plainly(compiled, inputs)

    return call


@torch.no_grad()
def run_plainly(model: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Any:
    return model(**inputs)


@torch.no_grad()
def _graphed(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """A whole eager call as one CUDA graph: inputs are copied in, outputs are left where they are,
    which is less than what turbotx does."""
    static = {name: x.clone() for name, x in inputs.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(**static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = model(**static)

    def call() -> Any:
        for name, x in inputs.items():
            static[name].copy_(x)
        graph.replay()
        return result

    return call


@torch.no_grad()
def compare(model: nn.Module, fast: Any, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Largest errors against float64, eager's and turbotx's, by the rule of all tests."""
    if DRY:  # nothing is computed
        for _ in range(3):
            fast(**inputs)
        return {"eager": 1.0, "turbotx": 1.0, "allowed": 1.0, "run": 0, "holds": True}
    exact_model = copy.deepcopy(model).double()
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    exact, eager = _tensors(exact_model(**wide)), _tensors(model(**inputs))
    worst: dict[str, Any] = {"holds": True}
    for run in range(3):  # plainly, captured, replayed
        worst = find_worst(worst, _tensors(fast(**inputs)), eager, exact, run=run)
    return worst


def find_worst(
    worst: dict[str, Any], ours: Iterable[torch.Tensor], eager: Iterable[torch.Tensor],
    exact: Iterable[torch.Tensor], **where: Any,
) -> dict[str, Any]:  # fmt: skip
    """Return the row of the largest error so far, by the rule of all tests."""
    for mine, own, true in zip(ours, eager, exact, strict=True):
        errors = [float((x.double() - true).abs().max()) for x in (own, mine)]
        ulps = ULPS * torch.finfo(mine.dtype).eps * float(true.abs().max())
        allowed = FACTOR * errors[0] + ulps
        holds = errors[1] <= allowed  # False for a NaN
        if not holds or errors[1] >= worst.get("turbotx", 0.0):
            worst = {
                "eager": errors[0], "turbotx": errors[1], "allowed": allowed, **where,
                "holds": holds and worst["holds"],
            }  # fmt: skip
    return worst


def _tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def streamed_nbytes(model: nn.Module) -> int:
    """Bytes of the weights that a call reads whole: all but embedding tables, ALBERT's shared
    layers once for each time that they run."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    kept = [(n, p) for n, p in model.named_parameters() if id(p) not in tables]
    config = model.config
    times = config.num_hidden_layers if config.model_type == "albert" else 1
    return sum(p.nbytes * (times if "albert_layers" in n else 1) for n, p in kept)
