"""The stages of `gpu.py` that look at single kernels: smoke, softmax, LayerNorm, sweeps of tiles.

In: `emit(name, numbers)` and a stage's arguments. Out: rows such as::

    softmax/4096/fp16/large/turbotx   {"us": 310.2, "gb_per_s": 3460.1, "rows": 65536}
    sweep/bert-base/fp16/1x40/gemm*3072x768*/m64n32k128w4s5x1   {"replay_us": 168.4}
"""

from __future__ import annotations

import statistics
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from gpu_models import DTYPES
from gpu_plans import DRY, Sweep, label
from gpu_session import Session
from gpu_stages import Emit, is_sticky
from gpu_timing import DEVICE, time_graphed, time_replay, time_row
from torch import nn
from torch.nn import functional

import turbotx
from turbotx.errors import IndexOutOfRangeError

MANY_BYTES = 1 << (20 if DRY else 29)  # several times the caches of any GPU


class Block(nn.Module):
    """A layer's parts, one at a time: each is a kernel, or a GEMM with what follows it."""

    def __init__(self, hidden: int = 768, inner: int = 3072) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.up, self.down = nn.Linear(hidden, inner), nn.Linear(inner, hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)

    def pointwise(self, x: torch.Tensor) -> torch.Tensor:
        return functional.silu(x) * x + 1

    def layer_norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)

    def softmax(self, x: torch.Tensor) -> torch.Tensor:
        return functional.softmax(x * 0.5, -1)

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        return functional.gelu(self.up(x))

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(functional.gelu(self.up(x))))

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 12, 64)).permute(2, 0, 3, 1, 4)
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.table(ids))


class Part(nn.Module):
    def __init__(self, block: Block, which: str) -> None:
        super().__init__()
        self.block, self.which = block, which

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = getattr(self.block, self.which)(x)
        return result


def smoke(emit: Emit) -> None:
    """Does anything run: memory, kernels, graphs, streams, index checks, dependent launches."""
    emit("smoke/memory", {"holds": True, **_probe_memory()})
    torch.manual_seed(0)
    block = Block().to(DEVICE, torch.float16).eval()
    for which in ("pointwise", "layer_norm", "softmax", "gelu", "residual", "attention", "embed"):
        for options in ({}, {"pdl": False}):
            name = f"smoke/{which}{'-no-pdl' if options else ''}"
            try:
                emit(name, _check_part(Part(block, which).eval(), which == "embed", options))
            except Exception as error:
                emit(name, {"holds": False, "error": traceback.format_exc()[-2500:]})
                if is_sticky(error):
                    raise
    emit("smoke/index", {"holds": DRY or _check_index(Part(block, "embed").eval())})


def _probe_memory() -> dict[str, Any]:
    from turbotx.memory.arena import open_range

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        kind = type(open_range(torch.device(DEVICE), 1 << 40)).__name__
    return {"range": kind, "said": [str(w.message) for w in said]}


@torch.no_grad()
def _check_part(part: Part, ids: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Against float64 at several numbers of tokens: plainly, captured, replayed, on a stream."""
    fast = turbotx.optimize(part, **options)
    wide, worst = Part(Block().to(DEVICE).double(), part.which).eval(), 0.0
    wide.block.load_state_dict(part.block.state_dict())
    side = torch.cuda.Stream()
    for batch, seq in ((1, 40), (3, 17), (1, 1), (2, 300)):
        if ids:
            x: Any = torch.randint(0, 1000, (batch, seq), device=DEVICE)
        else:
            x = torch.randn(batch, seq, 768, dtype=torch.float16, device=DEVICE)
        exact, own = wide(x if ids else x.double()), part(x)
        bound = 1.5 * float((own - exact).abs().max())
        bound += 2 * torch.finfo(torch.float16).eps * float(exact.abs().max())
        for run in range(4):
            with torch.cuda.stream(side if run == 3 else torch.cuda.current_stream()):
                got = fast(x)
            torch.cuda.synchronize()
            error = float((got - exact).abs().max())
            if not error <= bound and not DRY:
                return {"holds": False, "at": label((batch, seq)), "run": run, "error": error,
                        "bound": bound}  # fmt: skip
            worst = max(worst, error / bound)
    return {"holds": True, "worst": round(worst, 3), "builds": fast.stats()["kernel_builds"]}


def _check_index(part: Part) -> bool:
    """An index out of range is reported at once or by the next call, and reads nothing."""
    fast = turbotx.optimize(part)
    good = torch.zeros(1, 8, dtype=torch.int64, device=DEVICE)
    fast(good)
    try:
        fast(good + 5000)  # says so itself where the device was quick
        torch.cuda.synchronize()
        fast(good)
    except IndexOutOfRangeError:
        return True
    return False


def functions(
    emit: Emit, dtype: str, large: bool, widths: Sequence[int] = (768, 1024, 4096)
) -> None:
    """Softmax and LayerNorm by turbotx, PyTorch and Inductor: of many rows in a row of calls, of 40
    rows inside a graph."""
    made = {
        f"{function}/{width}/{dtype}/{'large' if large else 'short'}/{engine}":
            _prepare(function, width, dtype, engine, large)
        for function in ("softmax", "layer_norm")
        for width in widths
        for engine in ("turbotx", "torch", "inductor")
    }  # fmt: skip
    for place, prepared in made.items():
        emit(place, _time_prepared(prepared, large))


def sweep_rows(emit: Emit, dtype: str) -> None:
    """Softmax and LayerNorm of many rows, by rows and warps a program."""
    for function in ("softmax", "layer_norm"):
        for width, tags in (
            (768, ("r1w1", "r1w2", "r1w4", "r2w1", "r2w2", "r2w4", "r4w4")),
            (1024, ("r1w1", "r1w2", "r1w4", "r2w2", "r4w4")),
            (4096, ("r1w4", "r1w8", "r1w16", "r2w8")),
        ):
            for tag in tags:
                place = f"sweep/{function}/{width}/{dtype}/{tag}"
                prepared = _prepare(function, width, dtype, "turbotx", True, tag)
                emit(place, _time_prepared(prepared, True))


Prepared = tuple[Callable[[], torch.Tensor], torch.Tensor]


@torch.no_grad()
def _prepare(
    function: str, width: int, dtype: str, engine: str, large: bool, tag: str = ""
) -> Prepared:
    """A call, right against float64, and its input."""
    rows = MANY_BYTES // (width * DTYPES[dtype].itemsize) if large else 40
    x = torch.randn(rows, width, dtype=DTYPES[dtype], device=DEVICE)
    weight, bias = (torch.randn(width, dtype=x.dtype, device=DEVICE) for _ in range(2))

    def softmax(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return functional.softmax(x, -1)

    def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (width,), weight, bias)

    plain: Callable[..., torch.Tensor] = softmax if function == "softmax" else layer_norm
    run = plain
    if engine == "turbotx":
        schedules = {"*": tag} if tag else {}
        run = turbotx.optimize(plain, cuda_graphs=False, schedules=schedules)
    elif engine == "inductor" and not DRY:
        torch._dynamo.reset()
        run = torch.compile(plain, dynamic=False)
    exact = plain(x[-9:].double(), weight.double(), bias.double())
    error = float((run(x, weight, bias)[-9:].double() - exact).abs().max())
    if not DRY and not error <= 2e-2 * float(exact.abs().max()):
        raise RuntimeError(f"{engine} is wrong by {error}")
    return partial(run, x, weight, bias), x


@torch.no_grad()
def _time_prepared(prepared: Prepared, large: bool) -> dict[str, Any]:
    call, x = prepared
    if large:
        us = statistics.median(time_row(call, 10) for _ in range(5))
    else:
        us = time_graphed(call)
    return {"us": round(us, 3), "gb_per_s": round(2 * x.nbytes / us / 1e3, 1), "rows": len(x)}


def sweep(emit: Emit, name: str, dtype: str, given: Sequence[Sweep]) -> None:
    """Whole calls with one kind of kernel's tiles changed at a time: bare replays, so that every
    weight comes from memory as it does in use."""
    session = Session(name, dtype, shape=given[0].shape)
    for one in given:
        place = f"sweep/{name}/{dtype}/{label(one.shape)}/{one.way}"
        singles = ({p: tag} for p, tags in one.tags.items() for tag in tags)
        for schedules in [{}, *singles, *one.together]:
            shown = ",".join(f"{p}={tag}" for p, tag in schedules.items()) or "default"
            try:
                bound = session.bind(one.shape, one.folded, pdl=one.pdl, schedules=schedules)
                replay = bound.replay()
                emit(f"{place}/{shown}", {"replay_us": time_replay(replay, one.runs)})
            except turbotx.TurbotxError as error:
                emit(f"{place}/{shown}", {"error": str(error)[-300:]})
                if is_sticky(error):
                    raise
