"""The tables of what was proved without a GPU: operators' samples, and GPU kernels' resources.

In: benchmarks/results/operators.json and resources.json. Out: Markdown for docs/operators.md and
docs/triton.md, which `docs/generate.py` writes between their marks::

    operators_table(Path("benchmarks/results"))
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

NOT_YET = "not yet measured"


def operators_table(folder: Path) -> str:
    """Return the sweep over torch's samples: totals, and a row for each that is not plain."""
    path = folder / "operators.json"
    if not path.exists():
        return NOT_YET
    found = json.loads(path.read_text())
    operators: dict[str, Any] = found["operators"]
    dtypes: Counter[str] = Counter()
    for entry in operators.values():
        dtypes.update(entry["samples"])
    counts = ", ".join(f"{count:,} in {dtype}" for dtype, count in dtypes.items())
    matching = sum(entry["matching"] for entry in operators.values())
    refused = sum(sum(entry["refused"].values()) for entry in operators.values())
    wrong = sum(len(entry["wrong"]) for entry in operators.values())
    rows = [
        f"{len(operators)} of {found['listed']} operators, torch {found['torch']}: "
        f"{dtypes.total():,} samples ({counts}); {matching:,} match, {refused} are not traced, "
        f"{wrong} break the rule. Where something is to be said:",
        "",
        "| operator | samples | match | not traced | ATen |",
        "|---|---|---|---|---|",
    ]
    for name, entry in operators.items():
        if entry["refused"] or entry["wrong"] or entry["aten"]:
            why = "; ".join(f"{count}: {reason}" for reason, count in entry["refused"].items())
            breaks = f" **{len(entry['wrong'])} break the rule**" if entry["wrong"] else ""
            aten = ", ".join(f"`{op}`" for op in entry["aten"])
            rows.append(
                f"| `{name}` | {sum(entry['samples'].values())} | {entry['matching']}{breaks} "
                f"| {why or 'none'} | {aten or 'none'} |"
            )
    return "\n".join(rows)


def resources_table(folder: Path) -> str:
    """Return what kernels use: a row a target, then the accesses narrower than they could be."""
    path = folder / "resources.json"
    if not path.exists():
        return NOT_YET
    found = json.loads(path.read_text())
    kernels: list[dict[str, Any]] = found["kernels"]
    models: dict[str, set[str]] = {}  # dtype -> architectures
    for name, dtype in (model.split() for row in kernels for model in row["models"]):
        models.setdefault(dtype, set()).add(name)
    listed = "; ".join(f"{dtype}: {', '.join(sorted(names))}" for dtype, names in models.items())
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    rows = [
        f"{len(kernels):,} builds, each a kernel on a target. {listed}. {versions}.",
        "",
        "| target | kernels | spilling | registers, most | shared KiB, most "
        "| loads of 128 bits | stores of 128 bits |",
        "|---|---|---|---|---|---|---|",
    ]
    for target in dict.fromkeys(row["target"] for row in kernels):
        own = [row for row in kernels if row["target"] == target]
        wide = [sum(row[f"{kind}_bits"] >= 128 for row in own) for kind in ("load", "store")]
        rows.append(
            f"| {target} | {len(own)} | {sum(row['spills'] > 0 for row in own)} "
            f"| {max(row['registers'] for row in own)} "
            f"| {max(row['shared_nbytes'] for row in own) / 1024:.0f} | {wide[0]} | {wide[1]} |"
        )
    rows += [
        "",
        "Kernels whose widest access to memory is narrower, in bits:",
        "",
        "| kernel | targets | load | store |",
        "|---|---|---|---|",
        *(
            f"| {name} | {', '.join(targets)} | {load} | {store} |"
            for (name, load, store), targets in _narrow(kernels).items()
        ),
    ]
    return "\n".join(rows)


def _narrow(kernels: list[dict[str, Any]]) -> dict[tuple[str, int, int], list[str]]:
    """Return kernel and widths -> targets, where less than 128 bits move at once; the templates of
    GEMMs are many names of one kernel, and count together."""
    found: dict[tuple[str, int, int], Counter[str]] = {}
    for row in sorted(kernels, key=lambda row: str(row["kernel"])):
        widths = row["load_bits"], row["store_bits"]
        if min(widths) < 128:
            gemm = row["kernel"].startswith("gemm_")
            name = "GEMM templates" if gemm else f"`{row['kernel']}`"
            found.setdefault((name, *widths), Counter())[row["target"]] += 1
    return {
        key: [f"{target} ({count})" if "GEMM" in key[0] else target
              for target, count in targets.items()]
        for key, targets in found.items()
    }  # fmt: skip
