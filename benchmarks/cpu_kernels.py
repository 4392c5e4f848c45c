"""The C++ building blocks alone: packed GEMMs, attention, vector math, against torch's own kernels.

In: nothing. Out: tables on the terminal and benchmarks/results/cpu_kernels.json. Sections may be
run alone; each replaces its part of the file. Engines take turns, GEMM weights are cycled through
so that they come from memory as in a model, and a disturbed row is tried again::

    python benchmarks/cpu_kernels.py [gemm_float32] [gemm_bfloat16] [attention] [vecmath]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from turbotx.kernels.build import FLAGS, HEADERS, find_compiler
from turbotx.kernels.processor import processor_name
from turbotx.runtime.cpu.launch_table import load_library

RESULTS = Path(__file__).parent / "results" / "cpu_kernels.json"
SECTIONS = ("gemm_float32", "gemm_bfloat16", "attention", "vecmath")
NAMES = {torch.float32: "float", torch.bfloat16: "bf16"}
WIDTHS = [  # MiniLM's and BERT-base's linear layers, input x output
    *((384, 1152), (384, 384), (384, 1536), (1536, 384)),
    *((768, 2304), (768, 768), (768, 3072), (3072, 768)),
]
TOKENS = (1, 10, 40, 64, 128, 256, 1024)
SHAPES = ((1, 10), (1, 40), (1, 128), (4, 64), (8, 128), (1, 512))
STREAMED_NBYTES = 96 << 20  # three times the last-level cache of the machine this was written on
Call = Callable[[int], object]


def build_library() -> ctypes.CDLL:
    """Compile cpu_kernels.cpp as generated code is; pointers and longs throughout."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.so"
        compiler, source = find_compiler(), Path(__file__).with_suffix(".cpp")
        unit = str(path.with_suffix(".o"))
        subprocess.run(
            [compiler, *FLAGS, f"-I{HEADERS}", f"-I{source.parent}", "-c", str(source), "-o", unit],
            check=True,
        )
        subprocess.run([compiler, "-shared", unit, "-o", str(path)], check=True)
        library = ctypes.CDLL(str(path))
    library.ttx_use_threads(load_library("runtime")[0].ttx_share)
    for name in ("float", "bf16", "mkl"):
        getattr(library, f"pack_{name}").restype = ctypes.c_void_p
    return library


def busy_seconds() -> tuple[float, float]:
    """CPU seconds spent so far by every process of this machine, and by this one; Linux only."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0, 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, stat.read_text().split()[1:9]
    )
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK"), time.process_time()


def take_turns(calls: dict[str, Call], tries: int = 4) -> dict[str, Any]:
    """The least disturbed of a few tries: what others used of the cores is measured with it."""
    best: dict[str, Any] = {"others_cores": math.inf}
    for _ in range(tries):
        start, (all_before, own_before) = time.perf_counter(), busy_seconds()
        engines = take_rounds(calls)
        wall, (all_after, own_after) = time.perf_counter() - start, busy_seconds()
        others = max(0.0, (all_after - all_before - own_after + own_before) / wall)
        if others < best["others_cores"]:
            best = {"others_cores": round(others, 2), "engines": engines}
        if others < 0.06:
            break
        time.sleep(0.5)
    return best


def take_rounds(calls: dict[str, Call], rounds: int = 9, turn_s: float = 0.010) -> dict[str, Any]:
    """Median and best microseconds per call; every engine runs a short turn in each round."""
    counter = 0
    inner = {}
    for name, call in calls.items():
        call(0)
        start = time.perf_counter()
        call(1)
        inner[name] = max(1, min(2000, int(turn_s / max(time.perf_counter() - start, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for i in range(inner[name]):
                call(counter + i)
            times[name].append((time.perf_counter() - start) / inner[name] * 1e6)
        counter += max(inner.values())
    return {
        name: {"median_us": round(float(np.median(t)), 2), "best_us": round(min(t), 2)}
        for name, t in times.items()
    }


def addresses(*items: Any) -> list[Any]:
    """Tensors as pointers, integers as longs, packed weights as they are."""
    convert = {torch.Tensor: lambda t: ctypes.c_void_p(t.data_ptr()), int: ctypes.c_long}
    return [convert.get(type(x), lambda y: y)(x) for x in items]  # type: ignore[no-untyped-call]


class Packed:
    """Weights packed by one of the library's packers, freed with the object."""

    def __init__(self, library: ctypes.CDLL, name: str, weights: list[torch.Tensor]) -> None:
        self._free = getattr(library, f"free_{name}")
        pack = getattr(library, f"pack_{name}")
        self.handles = [ctypes.c_void_p(pack(*addresses(w, *w.shape))) for w in weights]

    def __del__(self) -> None:
        for handle in self.handles:
            self._free(handle)


def gemm_engines(
    library: ctypes.CDLL, weights: list[torch.Tensor], own: Packed, mkl: Packed | None, m: int
) -> dict[str, Call]:
    """Every way to multiply m rows by a weight, each as a function of which weight."""
    dtype, (n, k), count = weights[0].dtype, weights[0].shape, len(weights)
    a, c = torch.randn(m, k).to(dtype), torch.empty(m, n, dtype=dtype)
    transposed = [w.t() for w in weights]
    linear = getattr(library, f"linear_{NAMES[dtype]}")
    bias = torch.zeros(n, dtype=dtype)
    tail, rest = addresses(a, k, m, c, n), [None, 0]
    gelu = [*addresses(bias), 2]
    reordered = [torch.ops.mkldnn._reorder_linear_weight(w, m) for w in weights]
    calls: dict[str, Call] = {
        "turbotx": lambda i: linear(own.handles[i % count], *tail, *rest),
        "turbotx+bias+gelu": lambda i: linear(own.handles[i % count], *tail, *gelu),
        "torch.mm": lambda i: torch.mm(a, transposed[i % count], out=c),
        "onednn": lambda i: torch.ops.mkldnn._linear_pointwise(
            a, reordered[i % count], None, "none", [], ""
        ),
        "onednn+bias+gelu": lambda i: torch.ops.mkldnn._linear_pointwise(
            a, reordered[i % count], bias, "gelu", [], "none"
        ),
    }
    if mkl is not None:
        packed = [torch.ops.mkl._mkl_reorder_linear_weight(w, m) for w in weights]
        calls["mkl direct"] = lambda i: library.linear_mkl(mkl.handles[i % count], *tail)
        calls["mkl::_mkl_linear"] = lambda i: torch.ops.mkl._mkl_linear(
            a, packed[i % count], weights[i % count], None, m
        )
    return calls


def measure_gemms(library: ctypes.CDLL, dtype: torch.dtype) -> list[dict[str, Any]]:
    rows = []
    for k, n in WIDTHS:
        weight_nbytes = n * k * dtype.itemsize
        count = math.ceil(STREAMED_NBYTES / weight_nbytes)
        weights = [torch.randn(n, k).to(dtype) for _ in range(count)]
        own = Packed(library, NAMES[dtype], weights)
        with_mkl = dtype == torch.float32 and torch.backends.mkl.is_available()
        mkl = Packed(library, "mkl", weights) if with_mkl else None
        for m in TOKENS:
            timing = take_turns(gemm_engines(library, weights, own, mkl, m))
            us = timing["engines"]["turbotx"]["median_us"]
            speed = {
                "gflops": round(2e-3 * m * n * k / us, 1),
                "weight_gb_per_s": round(weight_nbytes * 1e-3 / us, 1),
            }
            rows.append({"k": k, "n": n, "m": m, "weights": count, **speed, **timing})
            show(f"{k:5} x {n:5}  m {m:5}", timing)
    return rows


def measure_attention(library: ctypes.CDLL) -> list[dict[str, Any]]:
    """q, k and v read in place from a packed projection, output head-merged, for every engine."""
    rows, heads = [], 12
    for dtype in NAMES:
        for dim in (32, 64):
            for batch, seq in SHAPES:
                qkv = torch.randn(batch, seq, 3, heads, dim).to(dtype)
                q, k, v = qkv.permute(2, 0, 3, 1, 4)
                out = torch.empty(batch, seq, heads * dim, dtype=dtype)
                call = getattr(library, f"attend_{NAMES[dtype]}_{dim}")
                args = addresses(qkv, out, batch, heads, seq)
                calls = attention_engines(q, k, v)
                timing = take_turns({"turbotx": lambda i, f=call, a=args: f(*a), **calls})
                flops = 4 * batch * heads * seq * seq * dim
                us = timing["engines"]["turbotx"]["median_us"]
                gflops = round(flops * 1e-3 / us, 1)
                row = {"dtype": str(dtype).removeprefix("torch."), "head_dim": dim, "heads": heads}
                rows.append(row | {"batch": batch, "seq": seq, "gflops": gflops, **timing})
                show(f"{row['dtype']:8} dim {dim}  ({batch}, {seq:3})", timing)
    return rows


def attention_engines(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Call]:
    def merge(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(2)

    scale = q.shape[-1] ** -0.5
    return {
        "sdpa": lambda i: merge(F.scaled_dot_product_attention(q, k, v)),
        "bmm+softmax+bmm": lambda i: merge(((q @ k.mT) * scale).softmax(-1) @ v),
    }


def measure_vecmath(library: ctypes.CDLL) -> list[dict[str, Any]]:
    """A million numbers in cache-sized pieces: nanoseconds per number on all threads."""
    x, y = torch.rand(65_536) * 8 - 4, torch.empty(65_536)
    positive = x.abs() + 0.1
    functions: dict[str, Callable[..., torch.Tensor]] = {
        **{n: getattr(torch, n) for n in ("exp", "log", "erf", "tanh", "sigmoid", "expm1")},
        **{n: getattr(torch, n) for n in ("log1p", "sin", "cos", "rsqrt")},
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "softplus": F.softplus,
    }
    rows = []
    for name, function in functions.items():
        source = positive if name in ("log", "log1p", "rsqrt") else x
        call, args = getattr(library, f"map_{name}"), addresses(source, y, x.numel())
        timing = take_turns(
            {"turbotx": lambda i: call(*args), "torch": lambda i: function(source)}  # noqa: B023
        )
        per_number = timing["engines"]["turbotx"]["median_us"] * 1e3 / x.numel()
        rows.append({"function": name, "ns_per_number": round(per_number, 4), **timing})
        show(f"{name:10}", timing)
    return rows


def show(label: str, timing: dict[str, Any]) -> None:
    engines = timing["engines"]
    best = min(e["median_us"] for name, e in engines.items() if "gelu" not in name)
    cells = [
        f"{n} {e['median_us']:.1f}{'*' * (e['median_us'] == best)}" for n, e in engines.items()
    ]
    note = f"  (others used {timing['others_cores']} cores)" if timing["others_cores"] > 0.1 else ""
    print(label, " ", "  ".join(cells) + note, flush=True)


def describe_machine() -> dict[str, Any]:
    return {
        "device": processor_name(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="section", help=", ".join(SECTIONS))
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    unknown = set(args.sections) - set(SECTIONS)
    if unknown:
        parser.error(
            f"no section named {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}"
        )
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    library = build_library()
    measures: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "gemm_float32": lambda: measure_gemms(library, torch.float32),
        "gemm_bfloat16": lambda: measure_gemms(library, torch.bfloat16),
        "attention": lambda: measure_attention(library),
        "vecmath": lambda: measure_vecmath(library),
    }
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for section in args.sections or SECTIONS:
        print(f"\n{section} (median microseconds a call, * the fastest)")
        machine = describe_machine()
        record[section] = {"machine": machine, "rows": measures[section]()}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
