"""GEMMs only: a lower bound for `bench`: a model's GEMMs and attention without the ops in between.

In: a loaded model. Out: a function that runs its matrix products, with weights packed once by a
library, and its attention, on dense dummy tensors of the right sizes, in the model's order; or of
int8, rows and weights, with attention in the model's dtype::

    make_gemms_only(loaded, "mkl")((), inputs)      # the engine "floor-mkl"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree

from turbotx import ir
from turbotx.cli.models import ModelWithInputs
from turbotx.engine.optimize import engine_of, optimize
from turbotx.errors import ModelError
from turbotx.ir.expr import evaluate
from turbotx.ir.quantized_ops import quantize_rows, row_scale
from turbotx.program.link import weight_window

Packed = Callable[[torch.Tensor], torch.Tensor]
Step = Callable[[], object]


def make_gemms_only(loaded: ModelWithInputs, library: str) -> Callable[..., None]:
    """Return the call with "mkl", "onednn", or "int8" by oneDNN; raise ModelError if the library
    does not support it."""
    module = optimize(loaded.model, backend="aten")
    engine = engine_of(module)
    captured = engine.capture(loaded.args, loaded.kwargs)
    compiled = engine.compile(captured)
    weights = compiled.program.runtime.weights
    weights.refresh()
    matcher = captured.matcher
    pack = {"mkl": _pack_mkl, "onednn": _pack_onednn, "int8": _pack_int8}[library]
    narrow = torch.uint8 if library == "int8" else None
    makers: list[Callable[[Mapping[str, int]], Step]] = []
    for launch in compiled.assembly.launches:
        if isinstance(launch, ir.GemmLaunch):
            packed = pack(weights.window(weight_window(launch.weight)).contiguous())
            makers.append(_product(launch, packed, narrow or launch.x.dtype))
        elif isinstance(launch, ir.GroupedGemmLaunch):
            raise ModelError(f"{launch.name}: the library has no packed product of experts")
        elif isinstance(launch, ir.AttentionLaunch):
            makers.append(_attend(launch))
    bound: dict[tuple[int, ...], list[Step]] = {}

    def run(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        leaves = pytree.tree_leaves((args, dict(kwargs)))
        dims = matcher.match([x.shape for x in leaves if isinstance(x, torch.Tensor)])
        assert dims is not None
        if dims not in bound:
            named = dict(zip(captured.dims, dims, strict=True))
            bound[dims] = [make(named) for make in makers]
        for step in bound[dims]:
            step()

    return run


def _product(
    launch: ir.GemmLaunch, packed: Packed, dtype: torch.dtype
) -> Callable[[Mapping[str, int]], Step]:
    x = launch.x

    def make(dims: Mapping[str, int]) -> Step:
        rows, depth = evaluate(launch.rows, dims), int(x.shape[-1])
        given = torch.ones(rows, depth, dtype=dtype)
        return lambda: packed(given)

    return make


def _attend(launch: ir.AttentionLaunch) -> Callable[[Mapping[str, int]], Step]:
    """Return a maker of attention steps: q, k and v laid out as by a packed projection, heads
    merged after."""
    operands = (launch.q, launch.k, launch.v)

    def make(dims: Mapping[str, int]) -> Step:
        given = []
        for operand in operands:
            batch, heads, rows, width = (evaluate(e, dims) for e in operand.shape)
            whole = torch.ones(batch, rows, heads, width, dtype=operand.dtype)
            given.append(whole.transpose(1, 2))
        grouped = given[0].shape[1] != given[1].shape[1]
        q, k, v = given
        attend: Any = torch.nn.functional.scaled_dot_product_attention
        return lambda: attend(q, k, v, enable_gqa=grouped).transpose(1, 2).flatten(2)

    return make


def _pack_mkl(weight: torch.Tensor) -> Packed:
    if weight.dtype is not torch.float32 or not torch.backends.mkl.is_available():
        raise ModelError("MKL's packed GEMM is for float32, in a PyTorch built with MKL")
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, 128)
    return lambda x: torch.ops.mkl._mkl_linear(x, packed, weight, None, x.shape[0])


def _pack_onednn(weight: torch.Tensor) -> Packed:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _pack_int8(weight: torch.Tensor) -> Packed:
    """Of rows of uint8, for which alone oneDNN takes weights packed once; sums become floats."""
    onednn: Any = torch.ops.onednn  # private
    if not hasattr(onednn, "qlinear_prepack"):
        raise ModelError("this PyTorch was built without oneDNN's int8 products")
    scale = row_scale(weight)
    packed = onednn.qlinear_prepack(quantize_rows(weight, scale), None)
    zeros, by = torch.zeros(len(weight), dtype=torch.int64), scale.flatten()
    return lambda x: onednn.qlinear_pointwise(
        x, 1.0, 0, packed, by, zeros, None, 1.0, 0, weight.dtype, "none", [], ""
    )
