"""torch's own samples of every operator that the op table computes, through `turbotx.optimize`.

In: operators' names (all of operators.txt by default). Out: benchmarks/results/operators.json,
renewed after each operator: how many samples match eager by the error rule of the project, which
cannot be traced and why, and what ATen ran; a run goes on where another ended::

    python -m tests.ops.sweep softmax where --again
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import turbotx
from tests.ops.operator_samples import (
    NAMES,
    Batch,
    Sample,
    batches,
    dtypes_of,
    find_fault,
    find_refusal,
    samples_of,
)
from turbotx.engine.optimize import engine_of

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "operators.json"
DTYPES = (torch.float32, torch.bfloat16)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.uint8, torch.bool)
INTEGERS = (
    "add", "sub", "mul", "where", "clamp", "cat", "floor_divide", "remainder", "bitwise_and",
    "sum", "amax", "argmax", "eq",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of a sample. refused: why it cannot be traced; wrong: how it differs."""

    sample: Sample
    refused: str | None = None
    wrong: str | None = None


def run_batch(batch: Batch, externs: set[str]) -> Iterator[Outcome]:
    """Yield an outcome per sample; a batch that fails as a whole is halved, down to the culprit.

    externs: collects the ops that ATen ran.
    """
    fast = turbotx.optimize(batch.call)
    try:
        ours = fast(*batch.tensors)
    except Exception as error:
        if len(batch.samples) > 1:
            for half in batch.halves():
                yield from run_batch(half, externs)
            return
        yield explain(batch.samples[0], error)
        return
    for compiled in engine_of(fast).variants():
        externs |= {str(x.call.target) for x in compiled.assembly.launches if x.kind == "aten"}
    for sample, result in zip(batch.samples, ours, strict=True):
        yield Outcome(sample, wrong=find_fault(sample, result))


def explain(sample: Sample, error: Exception) -> Outcome:
    """Tell what tracing cannot take from what is a mistake of ours."""
    known = find_refusal(error)
    if known is not None:
        return Outcome(sample, known)
    said = f"{sample}: {type(error).__name__}: {error}".replace(f"{ROOT}/", "")
    return Outcome(sample, wrong=said[:500])


def sweep(name: str, dtypes: Sequence[torch.dtype] = DTYPES) -> tuple[list[Outcome], set[str]]:
    """Return what became of every sample of an operator, and the ops that ATen ran."""
    samples = [sample for dtype in dtypes for sample in samples_of(name, dtype)]
    externs: set[str] = set()
    outcomes = [o for batch in batches(samples) for o in run_batch(batch, externs)]
    return outcomes, externs


def record_of(outcomes: list[Outcome], externs: set[str]) -> dict[str, Any]:
    """Return an operator's entry in the results."""
    counts = Counter(str(o.sample.dtype)[6:] for o in outcomes)
    return {
        "samples": dict(counts),
        "matching": sum(o.refused is None and o.wrong is None for o in outcomes),
        "refused": dict(Counter(o.refused for o in outcomes if o.refused)),
        "wrong": [o.wrong for o in outcomes if o.wrong],
        "aten": sorted(externs),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="operators in torch's op_db; all by default")
    parser.add_argument("--again", action="store_true", help="also those with a result")
    parser.add_argument("--seconds", type=float, help="begin no operator after that time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    found = json.loads(given.out.read_text())["operators"] if given.out.exists() else {}
    begin = time.monotonic()
    for name in given.names or NAMES:
        if name in found and not given.again:
            continue
        spent = time.monotonic() - begin
        if given.seconds is not None and spent > given.seconds:
            break
        # Some take no floats at all, as one_hot.
        whole = name in INTEGERS or not dtypes_of(name) & set(DTYPES)
        dtypes = (*DTYPES, *INTEGER_DTYPES) if whole else DTYPES
        found[name] = record_of(*sweep(name, dtypes))
        shown = {key: value for key, value in found[name].items() if value}
        print(f"{spent:5.0f} s  {name:32} {shown}", flush=True)
        order = {n: found[n] for n in NAMES if n in found}
        record: dict[str, Any] = {"torch": torch.__version__, "listed": len(NAMES)}
        given.out.write_text(json.dumps(record | {"operators": order}, indent=1) + "\n")
    return int(any(entry["wrong"] for entry in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
