"""The tables of docs/scale.md: large models, long sequences, a shared machine, many layers.

In: benchmarks/results/{scale,memory}.json. Out: Markdown, one table a name, losing rows too::

    SCALE_TABLES["scale_memory"](Path("benchmarks/results"))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cpu_tables import NOT_YET, line, read

HOW = {
    "eager": "eager", "default": "`turbotx.optimize`",
    "released": "the same with `keep_weights=False`", "load": "`turbotx.load`",
    "load_panels": "`turbotx.load` of a file with panels",
}  # fmt: skip


def memory_rows(folder: Path) -> str:
    """What is resident after each stage, and how long a first result takes."""
    found = _part(folder, "memory")
    if found is None:
        return NOT_YET
    lines = [_head(("model", "parameters", "", "model or file loaded", "after the first call",
                    "first result, s"), 3)]  # fmt: skip
    for row in found["rows"]:
        if row["how"] in HOW:
            stages = row["rss_mb"]
            loaded = stages.get("model", stages.get("loaded"))
            cells = (f"{row['parameters_mb']:,.0f}", HOW[row["how"]], f"{loaded:,.0f}",
                     f"{stages['first call']:,.0f}", f"{row['first_s']:.2f}")  # fmt: skip
            lines.append(line([row["model"], *cells]))
    together = {r["how"]: r["pss_mb"] for r in found["rows"] if "pss_mb" in r}
    stages_of = [r["rss_mb"] for r in found["rows"] if "saved" in r.get("rss_mb", {})]
    saved = max(x["saved"] - x["first call"] for x in stages_of)
    lines += [
        "",
        f"Four processes that serve one file of BERT-base take {together['4 x load']:,.0f} MB "
        "together (proportional set size), "
        f"{together['4 x load_panels']:,.0f} with panels. Saving adds {saved:,.0f} MB at the most. "
        f"({_machine(found)})",
    ]
    return "\n".join(lines)


def long_rows(folder: Path) -> str:
    """Attention by its length beside eager's."""
    heads = ("dtype", "tokens", "us a token", "eager", "of eager's time", "GFLOP/s")
    return _each(folder, "long", heads, lambda r: (
        r["dtype"], f"{r['length']:,}", f"{r['us_a_token']:.1f}", f"{r['eager_us_a_token']:.1f}",
        f"{r['of_eager']:.2f}", f"{r['gflops']:.0f}",
    ))  # fmt: skip


def shared_rows(folder: Path) -> str:
    """A call by one and two threads, alone and beside busy processes."""
    heads = ("busy processes beside", "engine", "threads", "wall, ms", "processor, ms")
    return _each(folder, "shared", heads, lambda r: (
        str(r["busy"]), r["engine"], str(r["threads"]), f"{r['wall_ms']:.2f}",
        f"{r['cpu_ms']:.2f}",
    ))  # fmt: skip


def first_call_rows(folder: Path) -> str:
    """Capture and compiling by the number of layers, with a cold and a warm cache."""
    found = _part(folder, "first_call")
    if found is None:
        return NOT_YET
    lines = [_head(("model", "layers", "capture", "compiling, cold", "compiling, warm"), 1)]
    times: dict[tuple[str, int], dict[str, Any]] = {}
    for row in found["rows"]:
        times.setdefault((row["model"], row["layers"]), {})[row["cache"]] = row
    for (model, layers), by in times.items():
        cells = (f"{by['warm']['capture_s']:.2f}", f"{by['cold']['compile_s']:.2f}",
                 f"{by['warm']['compile_s']:.2f}")  # fmt: skip
        lines.append(line([model, str(layers), *cells]))
    return "\n".join([*lines, "", f"Seconds. ({_machine(found)})"])


def plan_rows(folder: Path) -> str:
    """How far plans are above the bound, over all architectures and depths."""
    rows = read(folder, "memory").get("architectures", {}).get("rows", [])
    if not rows:
        return NOT_YET
    above = [r for r in rows if r["worst"] > 1.0]
    slow = [r for r in rows if r["solve_s"] > 0.1]
    said = "; ".join(f"{r['model']} of {r['layers']} layers {r['worst']:.3f}" for r in above)
    late = "; ".join(f"{r['model']} of {r['layers']} {r['solve_s']:.2f} s" for r in slow)
    count = len({r["model"] for r in rows})
    return (
        f"Of {len(rows)} plans ({count} architectures of 2 to 48 layers, each at six shapes) "
        f"{len(rows) - len(above)} take no more than the lower bound at any shape"
        + (f" ({said} x)" if said else "")
        + f", and {len(rows) - len(slow)} are solved within 0.1 s"
        + (f" ({late})" if late else "") + "."
    )  # fmt: skip


def _part(folder: Path, name: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = read(folder, "scale").get(name)
    return found


def _machine(found: dict[str, Any]) -> str:
    machine = found["machine"]
    return f"{machine['device']}, {machine['threads']} threads, torch {found['torch']}"


def _each(
    folder: Path, part: str, heads: Sequence[str], cells: Callable[[Any], Sequence[str]]
) -> str:
    """Return a table of a row each, the first two columns words, with its machine below."""
    found = _part(folder, part)
    if found is None:
        return NOT_YET
    lines = (line([*cells(row)]) for row in found["rows"])
    return "\n".join([_head(heads, 2), *lines, "", f"({_machine(found)})"])


def _head(names: Sequence[str], words: int) -> str:
    """Return a table's first two lines; the first columns hold words, the others numbers."""
    rules = ["---" if k < words else "---:" for k in range(len(names))]
    return f"{line([*names])}\n|{'|'.join(rules)}|"


SCALE_TABLES: dict[str, Callable[[Path], str]] = {
    "scale_memory": memory_rows,
    "scale_long": long_rows,
    "scale_shared": shared_rows,
    "scale_first_call": first_call_rows,
    "scale_plans": plan_rows,
}
