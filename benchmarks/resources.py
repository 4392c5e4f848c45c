"""What every generated kernel uses on every GPU target: registers, spills, widths, instructions.

In: architectures (default configurations of random weights, two layers). Out: a table and
benchmarks/results/resources.json, from machine code compiled here; no GPU is needed. It is all that
a GPU program launches at two shapes: attention as one kernel and as products around a softmax,
GEMMs by templates where they are chosen, kernels behind the library's, int8 and its kin. Equal ones
are a row; rows of models that are not named stay::

    python benchmarks/resources.py bert llama --targets sm_90 gfx942 --dtypes bfloat16
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from architectures import ARCHITECTURES
from parity import make_inputs, make_model

from turbotx.capture.trace import capture
from turbotx.engine.pipeline import compile_captured, jobs, schedule
from turbotx.kernels.job import Job
from turbotx.kernels.triton.compiler import TARGETS, Built, build
from turbotx.options import Options
from turbotx.passes.quantize import has_fp8

RESULTS = Path(__file__).parent / "results" / "resources.json"
WAYS = (
    {"attention": "flash"}, {"attention": "fused-softmax"},
    *({"quantize": how} for how in ("int8", "fp8", "int8-weights", "int4-weights")),
)  # fmt: skip
# Few queries, which take tiles of their own, and many. Lengths that are multiples of 16: others
# have builds without the promise, whose accesses are as narrow as any alignment allows.
SHAPES = ((1, 16), (2, 128))


def find_jobs(architecture: str, dtype: torch.dtype, targets: list[str]) -> Iterator[Job]:
    """Yield what the programs of a model launch, at every shape, on every target."""
    with torch.device("meta"):
        model = make_model(architecture, 2, vocab=1000).to(dtype)
    model.to_empty(device="cpu")  # values do not matter
    for way in WAYS:
        captured = capture(model, (), make_inputs(model, 2, 128, dtype))
        matcher = captured.matcher
        given = [make_inputs(model, batch, seq, dtype).values() for batch, seq in SHAPES]
        found = [matcher.match([t.shape for t in tensors]) for tensors in given]
        dims = [values for values in found if values is not None]
        assert len(dims) == len(SHAPES), f"{architecture} was captured for other shapes"
        # What a kernel uses when it does not wait by itself for the one before: so are all rows.
        options = Options(**way, pdl=False)
        call = compile_captured(captured, options, "sm_90").call
        # Without templates: the kernels behind the library's GEMMs, and no norms are folded.
        library = () if options.quantize != "none" else (replace(options, gemms="cublas"),)
        ways = (options, *library)
        able = [t for t in targets if options.quantize != "fp8" or has_fp8(t)]
        for target, chosen in itertools.product(able, ways):
            program = schedule(call, chosen, target)
            yield from (x.job for shape in dims for x in jobs(program, shape))


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
    built = build(list(jobs.values()), given.workers, show_progress)
    print(show_resources(built))
    made = [make_row(digest, b, users[digest]) for digest, b in zip(jobs, built, strict=True)]
    known = json.loads(given.out.read_text())["kernels"] if given.out.exists() else []
    models = {f"{name} {dtype}" for name in given.architectures for dtype in given.dtypes}
    rows = merge(known, made, models, given.targets)
    write(rows, given.out)
    spilling = Counter(row["target"] for row in rows if row["spills"])
    print(f"{len(made)} of {len(rows)} kernels, spilling: {dict(spilling) or 'none'}")
    return int(bool(spilling))


def show_resources(built: Iterable[Built]) -> str:
    """Return a table of what each kernel uses on each target."""
    head = (
        "kernel",
        "target",
        "registers",
        "spills",
        "shared B",
        "load b",
        "store b",
        "instructions",
    )
    rows: list[tuple[str, ...]] = [head]
    for b in built:
        r = b.resources
        rows.append((b.job.name, b.job.target, *map(str, astuple(r))))
    widths = [max(len(row[k]) for row in rows) for k in range(len(head))]
    lines = [
        "  ".join(
            c.ljust(w) if k < 2 else c.rjust(w)
            for k, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(lines)


def make_row(digest: str, built: Built, users: Iterable[str]) -> dict[str, Any]:
    job = built.job
    tiles = dict(job.constexprs) | {"warps": job.num_warps}
    row = {"kernel": job.name, "target": job.target, "digest": digest, "tiles": tiles}
    return row | asdict(built.resources) | {"models": list(users)}


def merge(
    known: Iterable[dict[str, Any]], made: Iterable[dict[str, Any]], models: set[str],
    targets: Iterable[str],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the rows with those of `models` on `targets` made anew, by target and kernel."""
    anew = set(targets)
    rows: dict[str, dict[str, Any]] = {}
    for row in known:
        left = [m for m in row["models"] if m not in models or row["target"] not in anew]
        if left:
            rows[row["digest"]] = row | {"models": left}
    for row in made:
        others = rows.get(row["digest"], {"models": []})["models"]
        rows[row["digest"]] = row | {"models": sorted({*row["models"], *others})}
    order = list(TARGETS)
    return sorted(rows.values(), key=lambda row: (order.index(row["target"]), row["kernel"]))


def write(rows: list[dict[str, Any]], out: Path) -> None:
    versions = {m.__name__: m.__version__ for m in (torch, triton, transformers)}
    record = {"versions": versions, "note": "compiled without a device"}
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = json.dumps(record, indent=1).removesuffix("\n}") + f',\n "kernels": [\n{lines}\n ]\n}}\n'
    out.parent.mkdir(exist_ok=True)
    out.write_text(text)


if __name__ == "__main__":
    raise SystemExit(main())
