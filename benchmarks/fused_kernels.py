"""Fused kernels alone: achieved bandwidth against a copy, torch's ops and Inductor's kernel.

In: kernels, widths and engines; all of them by default. Out: a line a row and
benchmarks/results/fused_kernels.json, written after each width: what was measured before stays.
Bytes are those that must be moved; `kernel_us` is turbotx's launch without its call's Python::

    python benchmarks/fused_kernels.py --kernels softmax layer_norm --widths 768 --engines turbotx
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import turbotx
from turbotx.cli.bench.runner import describe_machine

RESULTS = Path(__file__).parent / "results" / "fused_kernels.json"
ROWS = (1, 16, 128, 1024, 4096)
WIDTHS = (64, 384, 768, 1024, 4096)
ENGINES = ("turbotx", "copy", "torch", "inductor")
TURN_S, ROUNDS, VOCABULARY = 0.02, 7, 1000


class Fused(nn.Module):
    """One of the kernels at one width; `inputs` makes a call's tensors, (rows, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.norm, self.bias = nn.LayerNorm(width), nn.Parameter(torch.randn(width))
        self.words, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(512, width)

    def inputs(self, rows: int) -> tuple[torch.Tensor, ...]:
        return (torch.randn(rows, self.width),)


class Softmax(Fused):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.softmax(-1)


class LayerNorm(Fused):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class BiasGelu(Fused):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x + self.bias)


class ResidualLayerNorm(Fused):
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.bias + residual)

    def inputs(self, rows: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(rows, self.width), torch.randn(rows, self.width)


class EmbeddingLayerNorm(Fused):
    def forward(self, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return self.norm(self.words(ids) + self.places(places))

    def inputs(self, rows: int) -> tuple[torch.Tensor, ...]:
        return torch.randint(0, VOCABULARY, (rows,)), torch.arange(rows) % 512


KERNELS: dict[str, type[Fused]] = {
    "softmax": Softmax,
    "layer_norm": LayerNorm,
    "bias_gelu": BiasGelu,
    "residual_layer_norm": ResidualLayerNorm,
    "embedding_sum_layer_norm": EmbeddingLayerNorm,
}


def take_turns(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median microseconds of each call; every engine has a short turn in each round."""
    counts = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        counts[name] = max(1, min(1000, int(TURN_S / max(time.perf_counter() - start, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                call()
            times[name].append((time.perf_counter() - start) / counts[name] * 1e6)
    return {name: round(statistics.median(t), 2) for name, t in times.items()}


def measure(name: str, width: int, engines: list[str]) -> list[dict[str, Any]]:
    """Return one row per number of rows, by the engines asked for."""
    model = KERNELS[name](width).eval()
    fast = turbotx.optimize(model)
    inductor = torch.compile(model, dynamic=True) if "inductor" in engines else None
    found = []
    whole = turbotx.explain(fast, *model.inputs(2))
    for rows in ROWS:
        inputs, report = model.inputs(rows), whole.at(batch=rows)
        (launch,) = report.launches
        nbytes = launch.traffic.compulsory_nbytes
        source = torch.randn(max(1, nbytes // 8))
        target = torch.empty_like(source)
        calls: dict[str, Callable[[], object]] = {
            "turbotx": lambda i=inputs: fast(*i),
            "copy": lambda s=source, t=target: t.copy_(s),
            "torch": lambda i=inputs: model(*i),
        }
        if inductor is not None:
            calls["inductor"] = lambda i=inputs: inductor(*i)
        us = take_turns({e: calls[e] for e in calls if e in engines})
        row: dict[str, Any] = {"kernel": name, "width": width, "rows": rows, "nbytes": nbytes}
        if "turbotx" in engines:
            timed = report.profile(*inputs, runs=200).launches
            row["kernel_us"] = round(timed[0].median_us, 2)
        row["us"] = us
        row["gb_per_s"] = {e: round(nbytes / t / 1e3, 2) for e, t in us.items()}
        found.append(row)
        shown = "  ".join(f"{e} {t:.1f}" for e, t in us.items())
        print(f"{name:26} {rows:5} x {width:5}  kernel {row.get('kernel_us', 0):.1f}  {shown}",
              flush=True)  # fmt: skip
    return found


def merge(record: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Add what was measured; engines that were not measured now keep their numbers."""
    kept = {(r["kernel"], r["width"], r["rows"]): r for r in record.get("rows", [])}
    for row in rows:
        old = kept.setdefault((row["kernel"], row["width"], row["rows"]), row)
        for part in ("us", "gb_per_s"):
            row[part] = {**old[part], **row[part]}
        old.update(row)
    record["rows"] = list(kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    with torch.no_grad():
        for name in options.kernels:
            for width in options.widths:
                merge(record, measure(name, width, options.engines))
                record["machine"] = describe_machine(options.threads)
                options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
