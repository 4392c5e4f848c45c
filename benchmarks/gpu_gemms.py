"""GEMMs of `gpu.py`: Triton templates against cuBLAS and a kernel, by tokens; tiles that are tuned.

In: widths, tokens, what runs the GEMMs. Out: microseconds of a block of two GEMMs, as in BERT's
feed-forward part: bias and GELU behind the first, bias and a residual behind the second::

    measure_blocks(768, 3072, "fp16", "turbotx-triton")["rows"]["16"]  ->  {"block_us": 7.9, ...}
"""

from __future__ import annotations

import copy
import os
import tempfile
from typing import Any

import torch
from gpu_models import DTYPES, VARIANTS, make_inputs, make_model
from gpu_timing import DEVICE, kernel_times, time_call, time_graphed
from torch import nn

import turbotx
from turbotx.graphed import GraphedProgram
from turbotx.kernels.gemm_choice import BUCKETS
from turbotx.kernels.tuned import save_tuned
from turbotx.signature import SizeMatcher
from turbotx.tune import gains, tune_call, tune_norms

WIDTHS = ((768, 3072), (1024, 4096), (384, 1536))
# Weights of all blocks together: larger than any cache, as a model's are.
STREAMED_NBYTES = 1 << 28
# Positions of the smallest model.
NORM_TOKENS = 512


class Blocks(nn.Module):
    """Blocks with weights of their own, so that none is found in a cache."""

    def __init__(self, hidden: int, inner: int, count: int) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(hidden, inner) for _ in range(count))
        self.down = nn.ModuleList(nn.Linear(inner, hidden) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(nn.functional.gelu(up(x)))
        return x


def measure_blocks(hidden: int, inner: int, dtype: str, engine: str) -> dict[str, Any]:
    """One block at each bucket of tokens, inside a graph of many; and its kernels, by name."""
    kind = DTYPES[dtype]
    streamed = 2 * hidden * inner * kind.itemsize
    count = max(2, STREAMED_NBYTES // streamed)
    with torch.device(DEVICE):
        model = Blocks(hidden, inner, count).to(kind).eval()
    fast = turbotx.optimize(model, cuda_graphs=False, **VARIANTS.get(engine, {}))
    rows = {}
    for tokens in BUCKETS:
        x = torch.randn(1, tokens, hidden, dtype=kind, device=DEVICE)
        with torch.no_grad():
            check(fast, model, x, engine)
            block_us = time_graphed(lambda x=x: fast(x), 2) / count
            kernels = kernel_times(lambda x=x: fast(x), 3)
        rows[str(tokens)] = {
            "block_us": round(block_us, 3),
            "weights_gb_per_s": round(streamed / block_us / 1e3, 1),
            "kernels": {name: round(us, 3) for name, (us, _) in kernels.items()},
        }
    return {"rows": rows, "kernel_builds": fast.stats()["kernel_builds"]}


def check(fast: Any, model: nn.Module, x: torch.Tensor, engine: str) -> None:
    """Raise RuntimeError where blocks are further from float64 than PyTorch's allow."""
    exact, own = copy.deepcopy(model).double()(x.double()), model(x)
    error = float((fast(x) - exact).abs().max())
    allowed = 1.5 * float((own - exact).abs().max())
    allowed += 2 * torch.finfo(x.dtype).eps * float(exact.abs().max())
    if not error <= allowed:
        raise RuntimeError(f"{engine} is wrong by {error} at {len(x[0])} tokens, not {allowed}")


def measure_norms(name: str, dtype: str, engine: str) -> dict[str, Any]:
    """A model cut to four layers at each bucket of tokens that its positions allow, one call."""
    model = make_model(name, DTYPES[dtype], layers=4)
    fast = turbotx.optimize(model, **VARIANTS[engine])
    rows = {}
    for tokens in BUCKETS:
        if tokens <= NORM_TOKENS:
            inputs = make_inputs(model, 1, tokens, DTYPES[dtype])
            rows[str(tokens)] = time_call(lambda inputs=inputs: fast(**inputs), 0.2)
            launches = turbotx.explain(fast, **inputs).compiled.assembly.launches
            rows[str(tokens)]["launches"] = len(launches)
    return {"rows": rows, "mapped_nbytes": fast.stats()["mapped_nbytes"]}


def measure_tuned(name: str, dtype: str, shape: tuple[int, int]) -> dict[str, Any]:
    """A model's latency before and after its tiles were searched; keeps nothing."""
    model = make_model(name, DTYPES[dtype])
    inputs = make_inputs(model, *shape, DTYPES[dtype])
    before, kept = os.environ.get("TURBOTX_CACHE_DIR"), {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TURBOTX_CACHE_DIR"] = folder
        try:
            first = turbotx.optimize(model)
            kept["before"] = time_call(lambda: first(**inputs))
            tensors, compiled = list(inputs.values()), turbotx.explain(first, **inputs).compiled
            dims = SizeMatcher(compiled.captured).match([t.shape for t in tensors])
            assert isinstance(compiled.program, GraphedProgram) and dims is not None
            device = compiled.program.runtime.device.describe()
            found = tune_call(compiled, dims, tensors)
            save_tuned(device, gains(found))
            again = turbotx.explain(turbotx.optimize(model), **inputs).compiled
            found += tune_norms(again, dims, tensors)
            save_tuned(device, gains(found))
            second = turbotx.optimize(model)
            kept["after"] = time_call(lambda: second(**inputs))
        finally:
            os.environ.pop("TURBOTX_CACHE_DIR")
            if before is not None:
                os.environ["TURBOTX_CACHE_DIR"] = before
    rows = [
        {"kernel": f.kernel, "bucket": f.bucket, "before": f.before, "best": f.best,
         "before_us": f.before_us, "best_us": f.best_us, "tried": f.tried}
        for f in found
    ]  # fmt: skip
    return {**kept, "found": rows}
