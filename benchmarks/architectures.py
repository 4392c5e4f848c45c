"""Architectures of transformers: exact as eager, and how few launches a layer takes.

In: names; each a default configuration of random weights, cut to two layers. Out: a table and
benchmarks/results/architectures.json: errors against float64 at several shapes (parity.py), the
launches that a third layer adds, regions that took several kernels and ops left to ATen, and why.
Each model has a process, and so the memory, to itself::

    python benchmarks/architectures.py bert llama --shapes 1,1 2,17
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from parity import ARCHITECTURES, compare, make_inputs, make_model

import turbotx
from turbotx.engine.optimize import engine_of
from turbotx.kernels.processor import processor_name

RESULTS = Path(__file__).parent / "results" / "architectures.json"
SHAPES = ("1,1", "2,17", "7,2", "3,40")


def count_layer(architecture: str) -> dict[str, int]:
    """Return the launches of one layer by kind: what three layers have more than two.

    They do not depend on the sizes, so small ones are taken.
    """
    found = []
    for layers in (2, 3):
        model = make_model(architecture, layers, small=True)
        fast = turbotx.optimize(
            model, backend="aten"
        )  # the launches are the same, nothing is built
        fast(**make_inputs(model, 2, 8, torch.float32))
        (compiled,) = engine_of(fast).variants()
        found.append(Counter(launch.kind for launch in compiled.assembly.launches))
    return dict(found[1] - found[0])


def measure(architecture: str, given: argparse.Namespace) -> dict[str, Any]:
    """Return what `compare` and `count_layer` find, measured in this process."""
    shapes = [(int(b), int(s)) for b, s in (shape.split(",") for shape in given.shapes)]
    found = compare(architecture, given.dtype, shapes, 2, given.vocab)
    return found | {"layer": count_layer(architecture), "vocab": given.vocab}


def measure_apart(architecture: str, given: argparse.Namespace) -> dict[str, Any] | None:
    """Return the same from a process of its own; None where that fails, which it has said."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        command = [sys.executable, __file__, architecture, "--here", "--out", str(record)]
        command += ["--shapes", *given.shapes, "--dtype", given.dtype]
        command += ["--vocab", str(given.vocab)] if given.vocab is not None else []
        ended = subprocess.run(command, check=False).returncode
        if not record.exists():
            print(f"{architecture:12} was not measured: its process ended with {ended}", flush=True)
            return None
        return dict(json.loads(record.read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="batch,length")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--vocab", type=int, help="tokens, where memory is short: only looked up")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--here", action="store_true", help="one model, in this process")
    given = parser.parse_args()
    if given.here:
        (architecture,) = given.architectures
        given.out.write_text(json.dumps(measure(architecture, given)))
        return 0
    known = json.loads(given.out.read_text())["models"] if given.out.exists() else []
    models = {(m["architecture"], m["dtype"]): m for m in known}
    missing = 0
    for architecture in given.architectures:
        found = measure_apart(architecture, given)
        if found is None:
            missing += 1
            continue
        print(f"{architecture:12} a layer: {found['layer']}", flush=True)
        models[architecture, given.dtype] = found
        order = sorted(models.values(), key=lambda m: ARCHITECTURES.index(m["architecture"]))
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        record = {"device": processor_name(), "versions": versions, "models": order}
        given.out.parent.mkdir(exist_ok=True)
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(missing or any(not row["passes"] for m in models.values() for row in m["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
