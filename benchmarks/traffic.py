"""Launches and bytes that one layer moves: eager, turbotx, and the least that fusion allows.

In: model names (bert, gpt2, llama; a default config of random weights, few layers) and a shape.
Out: a table and JSON. Counted from graphs, so no device is needed. A layer is what three layers
have more than two. Columns, in bytes: eager reads and writes every ATen op's operands; turbotx
those of its launches, before GEMMs take some as epilogues; the bound takes each run of non-GEMM
ops as one ideal kernel::

    python benchmarks/traffic.py bert gpt2 llama --batch 1 --seq 128
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
import transformers
from torch import fx

from turbotx import ir
from turbotx.capture.trace import capture
from turbotx.engine.pipeline import rewrite
from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import Expr, evaluate
from turbotx.ir.views import SPLITS, is_view
from turbotx.kernels.fusion.fuse import FusedRegion, fuse_all
from turbotx.kernels.fusion.traffic import kernel_traffic, param_nbytes
from turbotx.passes.partition import find_hoisted, partition, root_of
from turbotx.program.assemble import assemble

RESULTS = Path(__file__).parent / "results" / "traffic.json"
MODELS = ("bert", "gpt2", "llama")
LAYER_FIELDS = ("num_hidden_layers", "n_layer")


@dataclass
class Count:
    """Launches, and bytes: in all, and of what is neither a GEMM nor attention."""

    launches: int = 0
    nbytes: int = 0
    fused_nbytes: int = 0

    def minus(self, other: Count) -> Count:
        return Count(
            *(a - b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True))
        )


def make_model(name: str, layers: int) -> torch.nn.Module:
    config = transformers.AutoConfig.for_model(name)
    for field in LAYER_FIELDS:
        if hasattr(config, field):
            setattr(config, field, layers)
    if name == "llama":  # the 1-billion size: the default is a 7-billion one
        config.hidden_size, config.intermediate_size = 2048, 8192
        config.num_attention_heads, config.num_key_value_heads = 32, 8
        config.head_dim = 64
    config.vocab_size = 1000
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    return transformers.AutoModel.from_config(config).eval()


def operand_nbytes(operand: ir.Operand, dims: Mapping[str, int]) -> int:
    """Bytes of the distinct elements of a window: a stride of 0 repeats one."""
    count = 1
    for extent, stride in zip(operand.shape, operand.strides, strict=True):
        count *= evaluate(extent, dims) if stride != 0 else 1
    return count * operand.dtype.itemsize


def count_turbotx(launches: list[ir.Launch], dims: Mapping[str, int]) -> Count:
    found = Count()
    for launch in launches:
        if isinstance(launch, ir.KernelLaunch):
            read, written, _ = kernel_traffic(launch.kernel).at(dims)
            found.fused_nbytes += read + written
            found.nbytes += read + written
        else:
            found.nbytes += sum(operand_nbytes(a, dims) for a in launch.operands if a is not None)
        found.launches += 1
    return found


def count_bound(
    regions: list[FusedRegion], launches: list[ir.Launch], dims: Mapping[str, int]
) -> Count:
    """Each region reads what it needs from outside once and writes what leaves it once."""
    found = Count()
    for fused in regions:
        outputs = {root_of(n) for n in fused.region.outputs}
        params = [pair for low in fused.kernels
                  for pair in zip(low.operands, low.kernel.params, strict=True)]  # fmt: skip
        inside = {node for node, p in params if p.role == "out"}
        needed: dict[fx.Node, list[Expr]] = {}
        for low in fused.kernels:
            nbytes = param_nbytes(low.kernel)
            for node, p in zip(low.operands, low.kernel.params, strict=True):
                if (p.role == "in" and node not in inside) or (p.role == "out" and node in outputs):
                    needed.setdefault(node, []).append(nbytes[p.name])
        for node, parts in needed.items():
            size = sympy.Mul(*g.shape(node)) * g.dtype(node).itemsize
            found.fused_nbytes += min(sum(evaluate(e, dims) for e in parts), evaluate(size, dims))
        found.launches += bool(fused.kernels)
    others = [x for x in launches if not isinstance(x, ir.KernelLaunch)]
    rest = count_turbotx(others, dims)
    return Count(
        found.launches + rest.launches, found.fused_nbytes + rest.nbytes, found.fused_nbytes
    )


def count_eager(graph: fx.Graph, dims: Mapping[str, int]) -> Count:
    """Every ATen op but views reads its inputs and writes its output; attention is one op, and
    dropout, which does nothing here, none."""
    found = Count()
    products = ("linear", "mm", "addmm", "bmm", "matmul", "scaled_dot_product_attention")
    for node in graph.nodes:
        if node.op != "call_function" or is_view(node) or node.target in SPLITS:
            continue
        if not g.is_tensor(node) or node.target is g.GETITEM or "dropout" in str(node.target):
            continue
        tensors = [node, *(n for n in node.all_input_nodes if g.is_tensor(n))]
        nbytes = sum(evaluate(sympy.Mul(*g.shape(root_of(t) if _broadcast(t) else t)), dims)
                     * g.dtype(t).itemsize for t in tensors)  # fmt: skip
        found.launches += 1
        found.nbytes += nbytes
        if not any(p in str(node.target).split(".")[1:2] for p in products):
            found.fused_nbytes += nbytes
    return found


def _broadcast(node: fx.Node) -> bool:
    return is_view(node) and "expand" in str(node.target)


def count_model(name: str, layers: int, batch: int, seq: int) -> dict[str, Count]:
    inputs: dict[str, Any] = {"input_ids": torch.ones(2, 8, dtype=torch.long)}
    inputs["attention_mask"] = torch.ones(2, 8, dtype=torch.long)
    if name != "bert":
        inputs["use_cache"] = False
    captured = capture(make_model(name, layers), (), inputs)
    graph = captured.graph_module.graph
    dims = {n: seq if n == "seq" else batch for n in captured.dims}
    eager = count_eager(graph, dims)
    rewrite(graph)
    hoisted = find_hoisted(graph)
    fused = fuse_all(graph, partition(graph, hoisted), hoisted)
    launches = assemble(graph, fused, hoisted, captured.dims).launches
    return {
        "eager": eager,
        "turbotx": count_turbotx(launches, dims),
        "bound": count_bound(fused, launches, dims),
    }


def count_layer(name: str, batch: int, seq: int) -> dict[str, Count]:
    more, less = (count_model(name, layers, batch, seq) for layers in (3, 2))
    return {who: more[who].minus(less[who]) for who in more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    results: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "note": "counted from graphs; no device takes part",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "shape": {"batch": given.batch, "seq": given.seq, "dtype": "float32"},
        "layers": {},
    }
    print(f"one layer at batch {given.batch}, length {given.seq}, float32")
    print(f"{'model':8} {'':9} {'launches':>8} {'MB':>9} {'MB without GEMMs and attention':>31}")
    for name in given.models:
        layer = count_layer(name, given.batch, given.seq)
        results["layers"][name] = {who: asdict(count) for who, count in layer.items()}
        for who, c in layer.items():
            total, fused = c.nbytes / 1e6, c.fused_nbytes / 1e6
            print(f"{name:8} {who:9} {c.launches:8} {total:9.2f} {fused:31.2f}")
        ratio = layer["turbotx"].fused_nbytes / layer["bound"].fused_nbytes
        results["layers"][name]["fused_over_bound"] = ratio
        print(f"{name:8} fused traffic over the bound: {ratio:.3f}")
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
