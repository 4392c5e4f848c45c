"""What every generated kernel uses on every GPU target: registers, spills, widths, instructions.

In: architectures (default configurations of random weights, two layers). Out: a table and
benchmarks/results/resources.json, from machine code compiled here; no GPU is needed. Attention is
compiled both ways, flash and as two products around a softmax; equal kernels are one row::

    python benchmarks/resources.py bert llama --targets sm_90 gfx942 --dtypes bfloat16
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from architectures import ARCHITECTURES
from parity import make_inputs, make_model

from turbotx.assemble import assemble
from turbotx.capture import capture
from turbotx.kernels.fuse import fuse_all
from turbotx.kernels.launch_jobs import launch_job
from turbotx.kernels.targets import TARGETS, Job, build, show_resources
from turbotx.passes.partition import find_prepared, partition
from turbotx.pipeline import rewrite
from turbotx.signature import SizeMatcher

RESULTS = Path(__file__).parent / "results" / "resources.json"
WAYS = ("flash", "fused-softmax")
# Few queries, which take tiles of their own, and many. Lengths that are multiples of 16: others
# have builds without the promise, whose accesses are as narrow as any alignment allows.
SHAPES = ((1, 16), (2, 128))


def find_jobs(architecture: str, dtype: torch.dtype, targets: list[str]) -> Iterator[Job]:
    """Yield what the launches of a model compile, at every shape, for every target."""
    with torch.device("meta"):
        model = make_model(architecture, 2, vocab=1000).to(dtype)
    model.to_empty(device="cpu")  # values do not matter
    for way in WAYS:
        inputs = make_inputs(model, 2, 128, dtype)
        captured = capture(model, (), inputs)
        graph = captured.graph_module.graph
        rewrite(graph, way)
        prepared = find_prepared(graph)
        fused = fuse_all(graph, partition(graph, prepared), prepared)
        launches = assemble(graph, fused, prepared, captured.dims).launches
        for batch, seq in SHAPES:
            shapes = [t.shape for t in make_inputs(model, batch, seq, dtype).values()]
            values = SizeMatcher(captured).match(shapes)
            assert values is not None, f"{architecture} was captured for other shapes"
            dims = dict(zip(captured.dims, values, strict=True))
            made = (launch_job(x, target, dims) for target in targets for x in launches)
            yield from (job for job in made if job is not None)


def show_progress(done: int, total: int, what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{done}/{total} {what}"[:100], end="", file=sys.stderr, flush=True)
    elif done % 100 == 0 or done == total:
        print(f"{done}/{total}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--workers", type=int, help="processes that compile; default: the cores")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    jobs: dict[str, Job] = {}
    users: dict[str, dict[str, None]] = {}
    for name in given.architectures:
        for dtype in given.dtypes:
            for job in find_jobs(name, getattr(torch, dtype), given.targets):
                digest = job.digest()
                jobs[digest] = job
                users.setdefault(digest, {})[f"{name} {dtype}"] = None
            gc.collect()
            print(f"{name} {dtype}: {len(jobs)} kernels so far", file=sys.stderr, flush=True)
    rows: list[dict[str, Any]] = []
    built = build(list(jobs.values()), given.workers, show_progress)
    for digest, b in zip(jobs, built, strict=True):
        tiles = dict(b.job.constexprs) | {"warps": b.job.num_warps}
        row = {"kernel": b.job.name, "target": b.job.target, "tiles": tiles}
        rows.append(row | asdict(b.resources) | {"models": list(users[digest])})
    print(show_resources(built))
    versions = {m.__name__: m.__version__ for m in (torch, triton, transformers)}
    record = {"versions": versions, "note": "compiled without a device"}
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = json.dumps(record, indent=1).removesuffix("\n}") + f',\n "kernels": [\n{lines}\n ]\n}}\n'
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(text)
    spilling = Counter(row["target"] for row in rows if row["spills"])
    print(f"{len(rows)} kernels, spilling: {dict(spilling) or 'none'}")
    return int(bool(spilling))


if __name__ == "__main__":
    raise SystemExit(main())
