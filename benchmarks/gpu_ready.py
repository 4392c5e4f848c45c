"""Make a checkout ready for a machine with a GPU: every line tried, every kernel built beforehand.

In: plans of `gpu.py`. Out: a folder with the kernels of all stages, built for one target by the
Triton that is installed here, which has to be the version of that machine; and the commands::

    python benchmarks/gpu_ready.py --plans first figures --out build/gpu-ready
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from gpu_plans import PLANS  # noqa: E402

# What loading a kernel reads of what was built.
KEPT = (".cubin", ".ptx", ".json")
ARCHIVE = "kernels.tar.gz"


def dry_run(plan: str, folder: Path, only: set[str] | None = None) -> list[str]:
    """Go through every stage of a plan, building into `folder`; return what failed."""
    failed = []
    environment = {
        **os.environ, "TURBOTX_BENCHMARK_DRY": "1", "TURBOTX_BENCHMARK_BUILD": "1",
        "TURBOTX_CACHE_DIR": str(folder / "cache"),
    }  # fmt: skip
    for stage in (s for group in PLANS[plan]() for s in group):
        if only is not None and stage.name not in only:
            continue
        begin = time.perf_counter()
        rows, log = folder / f"{plan}.jsonl", folder / f"{plan}.log"
        command = [sys.executable, str(HERE / "gpu.py"), plan, "--stage", stage.name]
        with open(log, "a") as file:
            code = subprocess.call(
                [*command, "--out", str(rows)], env=environment, stdout=file, stderr=file
            )
        last = log.read_text().splitlines()[-1:] or [""]
        print(f"{time.perf_counter() - begin:6.1f} s  {stage.name}: {last[0]}", flush=True)
        if code:
            failed.append(f"{stage.name}: see {log}")
    return failed


SAVE = """
import sys, torch, transformers, turbotx
model = transformers.BertModel(transformers.BertConfig()).half().eval()
fast, ids = turbotx.optimize(model), torch.ones(1, 16, dtype=torch.long)
fast(input_ids=ids, attention_mask=ids)
turbotx.save(fast, sys.argv[1], targets=["sm_90"], weights=False)
"""


def save_bert(folder: Path) -> Path:
    """Save a BERT-base for the device without its weights, which any such model has."""
    path = folder / "bert-base.ttx"
    environment = {**os.environ, "TURBOTX_CACHE_DIR": str(folder / "cache")}
    subprocess.run([sys.executable, "-c", SAVE, str(path)], env=environment, check=True)
    return path


def pack(folder: Path) -> Path:
    """Put what loading needs of the built kernels into one file."""
    archive, cache = folder / ARCHIVE, folder / "cache"
    with tarfile.open(archive, "w:gz", compresslevel=6) as file:
        for path in sorted(cache.rglob("*")):
            if path.suffix in KEPT:
                file.add(path, path.relative_to(cache))
    return archive


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plans", nargs="+", default=sorted(PLANS), choices=sorted(PLANS))
    parser.add_argument("--stages", nargs="+", help="only these")
    parser.add_argument("--out", type=Path, default=HERE.parent / "build" / "gpu-ready")
    options = parser.parse_args()
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    only = set(options.stages) if options.stages else None
    failed = [f for plan in options.plans for f in dry_run(plan, folder, only)]
    saved = save_bert(folder)
    archive = pack(folder)
    import triton

    print(f"\n{archive}: {archive.stat().st_size / 2**20:.1f} MiB, Triton {triton.__version__}")
    print(f"{saved}: {saved.stat().st_size / 2**20:.1f} MiB")
    print("there, in the checkout, with these files beside it:")
    print(f"    mkdir -p /tmp/cache && tar xzf {archive.name} -C /tmp/cache")
    print("    export TURBOTX_CACHE_DIR=/tmp/cache PYTHONPATH=. PYTHONUNBUFFERED=1")
    for plan in options.plans:
        print(f"    python3 benchmarks/gpu.py {plan} --out rows/{plan}.jsonl")
    print("\n".join(failed))
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
