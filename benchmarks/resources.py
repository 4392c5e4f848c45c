"""What every kernel of a model uses on every GPU target: registers, spills, widths, instructions.

In: model names (bert, gpt2, llama; random weights, two layers). Out: a table and JSON, from machine
code compiled here; no GPU is needed::

    python benchmarks/resources.py bert --targets sm_90 gfx942
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from traffic import make_model

from turbotx import ir
from turbotx.assemble import assemble
from turbotx.capture import capture
from turbotx.kernels.attention_jobs import attention_job
from turbotx.kernels.cpp_attention import AttentionKernel
from turbotx.kernels.fuse import fuse_all
from turbotx.kernels.schedule import divisible_sizes
from turbotx.kernels.targets import TARGETS, build, kernel_job, show_resources
from turbotx.passes.partition import find_prepared, partition
from turbotx.pipeline import rewrite

RESULTS = Path(__file__).parent / "results" / "resources.json"


def targets_of(name: str, dtype: torch.dtype) -> list[Any]:
    """Return the model's distinct kernels and attention launches."""
    inputs: dict[str, Any] = {"input_ids": torch.ones(2, 8, dtype=torch.long)}
    inputs["attention_mask"] = torch.ones(2, 8, dtype=torch.long)
    if name != "bert":
        inputs["use_cache"] = False
    captured = capture(make_model(name, 2).to(dtype), (), inputs)
    graph = captured.graph_module.graph
    rewrite(graph)
    prepared = find_prepared(graph)
    fused = fuse_all(graph, partition(graph, prepared), prepared)
    found: dict[Any, Any] = {}
    for launch in assemble(graph, fused, prepared, captured.dims).launches:
        if isinstance(launch.target, ir.Kernel):
            found[launch.target.digest()] = launch.target
        elif isinstance(launch.target, AttentionKernel):
            found[launch.target] = launch.target
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["bert"])
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    results: dict[str, Any] = {"triton": triton.__version__, "torch": torch.__version__}
    results |= {"dtype": given.dtype, "note": "compiled without a device", "kernels": {}}
    for name in given.models:
        jobs = []
        for kernel in targets_of(name, getattr(torch, given.dtype)):
            for target in given.targets:
                if isinstance(kernel, AttentionKernel):
                    jobs.append(attention_job(kernel, target))
                else:
                    jobs.append(kernel_job(kernel, target, divisible=divisible_sizes(kernel)))
        built = build(jobs, given.workers)
        print(f"{name}\n{show_resources(built)}")
        results["kernels"][name] = [
            {"kernel": b.job.name, "target": b.job.target, **asdict(b.resources)} for b in built
        ]
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
