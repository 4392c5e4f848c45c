"""Rows of `gpu.py` as a record for results/gpu.json, and as lines for a terminal.

In: JSON lines, one measurement each; a later row of a name takes the place of an earlier one. Out::

    latency/bert-base/fp16/1x40/turbotx    latency_us 190.1, row_us 171.0, host_us 60.2
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = dict[str, dict[str, Any]]


def read_rows(paths: Sequence[Path]) -> Rows:
    """Return all rows by name; a line that was cut off is left out."""
    rows: Rows = {}
    for path in paths:
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            rows[row.pop("name")] = row
    return rows


def collect(rows: Rows) -> dict[str, Any]:
    """Return what is kept in results/gpu.json: the device, and the rows of all that ran."""
    results = {
        name: {k: v for k, v in row.items() if k != "stage"}
        for name, row in rows.items()
        if name != "device" and not name.startswith(("stage/", "warm/"))
    }
    return {"device": rows["device"]["device"], "results": results}


def summarize(rows: Rows) -> list[str]:
    """One line a row, numbers only, what is wrong or did not end last."""
    lines, bad = [], []
    for name, row in rows.items():
        plain = {k: v for k, v in row.items() if not isinstance(v, (dict, list))}
        plain.pop("stage", None)
        if name.startswith("kernels/"):
            lines += [f"{name}: {row['sum_us']} us in all", *_kernel_lines(row["kernels"])]
        elif row.get("holds") is False or name.startswith("stage/"):
            bad.append(f"{name}: {json.dumps(row)[:1500]}")
        elif name != "device":
            shown = ", ".join(f"{k} {v}" for k, v in plain.items())
            lines.append(f"{name:58} {shown[:150]}")
    right = sum(row.get("holds") is True for row in rows.values())
    lines.append(f"right: {right}, wrong: {sum(r.get('holds') is False for r in rows.values())}")
    return lines + bad


def _kernel_lines(kernels: Rows) -> list[str]:
    order = sorted(kernels.items(), key=lambda x: -x[1]["us"] * x[1]["launches"])
    return [f"    {x['us']:8.2f} us x {x['launches']:5.1f}  {name[:90]}" for name, x in order[:14]]
