"""The tables of docs/cpu.md, and of whole models in docs/results.md: what CPUs measured.

In: benchmarks/results/{latency,stream,dispatch,fused_kernels,cold_start}.json. Out: Markdown, rows
that turbotx loses included and marked; what has no result says so::

    latency_table(RESULTS)  ->  "| model | dtype | batch x length | turbotx | GEMMs only ..."
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from turbotx.cli.bench.runner import QUIET_CORES

NOT_YET = "not yet measured"
ENGINES = {
    "turbotx": "turbotx", "floor-mkl": "GEMMs only, MKL", "floor-onednn": "GEMMs only, oneDNN",
    "eager": "eager", "compile": "torch.compile", "compile-dynamic": "torch.compile, dynamic",
    "onnxruntime": "ONNX Runtime", "onnxruntime-optimized": "ONNX Runtime, optimized",
    "openvino": "OpenVINO", "zentorch": "zentorch", "ctranslate2": "CTranslate2",
    "turbotx-unpacked": "turbotx, pack_weights=False",
    "turbotx-int8": "turbotx, int8", "floor-int8": "GEMMs only, int8",
    "onnxruntime-int8": "ONNX Runtime, int8", "openvino-int8": "OpenVINO, int8",
    "ctranslate2-int8": "CTranslate2, int8", "turbotx-packed": "turbotx, packed",
    "turbotx-packed-int8": "turbotx, packed, int8", "compile-static": "torch.compile, static",
    "turbotx-int8-weights": "turbotx, int8 weights",
    "turbotx-int8-weights-head": "turbotx, int8 weights, head too",
    "turbotx-int4-weights": "turbotx, int4 weights",
}  # fmt: skip


def read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def latency_table(folder: Path, name: str = "latency") -> str:
    """A row a model, dtype and shape, medians in ms; the fastest real engine is bold."""
    found = read(folder, name)
    rows = found.get("rows", [])
    if not rows:
        return NOT_YET
    engines = [e for e in ENGINES if any(e in r["engines"] for r in rows)]
    has_floor = any(e.startswith("floor") for e in engines)
    heads = [
        "model",
        "dtype",
        "batch x length",
        *(ENGINES[e] for e in engines),
        *(["turbotx / GEMMs only"] if has_floor else []),
    ]
    lines = [_caption(found), "", line(heads), line(["---"] * 3 + ["---:"] * (len(heads) - 3))]
    disturbed = False
    for row in rows:
        ms = {e: x["median_ms"] for e, x in row["engines"].items()}
        real = [t for e, t in ms.items() if not e.startswith("floor")]
        floors = [t for e, t in ms.items() if e.startswith("floor")]
        cells = []
        for engine in engines:
            text = f"{ms[engine]:.2f}" if engine in ms else "-"
            best = engine in ms and not engine.startswith("floor") and ms[engine] == min(real)
            noisy = row["engines"].get(engine, {}).get("others_cores", 0.0) > QUIET_CORES
            disturbed |= noisy
            cells.append((f"**{text}**" if best else text) + ("*" if noisy else ""))
        own = ms.get("turbotx", ms.get("turbotx-int8"))
        ratio = f"{own / min(floors):.2f}" if floors and own is not None else "-"
        shape = row["shape"].replace("x", " x ")
        cells += [ratio] if has_floor else []
        lines.append(line([row["model"], row["dtype"], shape, *cells]))
    if disturbed:
        lines += ["", f"\\* others used more than {QUIET_CORES} cores of the machine meanwhile."]
    reasons = {
        (e, r["dtype"], why): None for r in rows for e, why in r["failed"].items()
    }  # fmt: skip
    lines += [
        f"\nWithout {ENGINES.get(e, e)} in {dtype}: {_brief(why)}." for e, dtype, why in reasons
    ]
    return "\n".join(lines)


def _brief(why: str) -> str:
    """Return what an error says, without its class and the codes that stand before the words."""
    _, coded, words = why.rpartition(" : ")
    return words if coded else why.partition(": ")[2] or why


def stream_table(folder: Path) -> str:
    """A row an engine: the whole stream, first call and builds included."""
    found = read(folder, "stream")
    if not found:
        return NOT_YET
    heads = ["model", "engine", "total s", "requests", "first call s", "median ms", "built",
             "after ten shapes"]  # fmt: skip
    lines = [_caption(found), "", line(heads), line(["---"] * 2 + ["---:"] * 6)]
    for model, engines in found["models"].items():
        for engine, x in engines.items():
            name = ENGINES.get(engine, engine)
            if not x["requests"]:
                why = x.get("error") or f"nothing within {x['stopped_at_s']:.0f} s"
                lines.append(line([model, name, why, "0", "-", "-", "-", "-"]))
                continue
            stopped = f" (stopped at {x['stopped_at_s']:.0f} s)" if "stopped_at_s" in x else ""
            numbers = [f"{x['total_s']:.1f}{stopped}", x["requests"], f"{x['first_call_s']:.1f}",
                       f"{x['median_ms']:.1f}", x["builds"], x["built_after_ten"]]  # fmt: skip
            lines.append(line([model, name, *map(str, numbers)]))
    return "\n".join(lines)


def dispatch_table(folder: Path) -> str:
    """A row a model: what a call costs beyond its kernels."""
    found = read(folder, "dispatch")
    if not found:
        return NOT_YET
    names = {
        "model": "model", "launches": "launches", "parameters": "parameters",
        "guards_us": "guards, µs", "between_launches_us": "a launch beyond its work, µs",
        "outside_us": "the rest of the call, µs", "native_us": "native run, µs",
    }  # fmt: skip
    lines = [_caption(found), "", line(list(names.values())), line(["---"] + ["---:"] * 6)]
    for r in found["rows"]:
        step = f", a step behind {r['past']} tokens" if r.get("past") else ""
        lines.append(line([r["model"] + step, *(str(r[k]) for k in names if k != "model")]))
    return "\n".join(lines)


def fused_table(folder: Path) -> str:
    """A row a kernel and number of rows: bandwidth over a copy's, time of torch and Inductor."""
    found = read(folder, "fused_kernels")
    if not found:
        return NOT_YET
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in found["rows"]:
        groups.setdefault((row["kernel"], row["rows"]), []).append(row)
    heads = ["kernel", "rows", "widths", "launch GB/s", "copy GB/s", "call, µs", "torch, µs",
             "Inductor, µs"]  # fmt: skip
    lines = [_caption(found), "", "Medians over the widths.", "", line(heads),
             line(["---"] + ["---:"] * 7)]  # fmt: skip
    for (kernel, count), rows in groups.items():
        speeds = [r["nbytes"] / r["kernel_us"] / 1e3 for r in rows if r.get("kernel_us")]
        copies = [r["gb_per_s"]["copy"] for r in rows if "copy" in r["gb_per_s"]]
        us = [_median([r["us"][e] for r in rows if e in r["us"]])
              for e in ("turbotx", "torch", "inductor")]  # fmt: skip
        cells = [kernel, str(count), str(len(rows)), _median(speeds), _median(copies), *us]
        lines.append(line(cells))
    return "\n".join(lines)


def cold_table(folder: Path) -> str:
    found = read(folder, "cold_start")
    if not found:
        return NOT_YET
    lines = [_caption(found), "", "| cache | first call, s | capture, s | compile, s | builds |",
             "|---|---:|---:|---:|---:|"]  # fmt: skip
    for cache in ("empty", "warm"):
        x = found[cache]
        seconds = [f"{x[k] / 1e3:.2f}" for k in ("first_call_ms", "capture_ms", "compile_ms")]
        lines.append(line([cache, *seconds, f"{x['builds']:.0f}"]))
    return "\n".join(lines)


def packed_table(folder: Path) -> str:
    """A row for each batch of mixed lengths and engine: the batch, and a real token of it."""
    found = read(folder, "packed")
    if not found:
        return NOT_YET
    heads = ["model", "lengths", "batch", "engine", "ms a batch", "µs a token",
             "µs a token of one text of the mean length"]  # fmt: skip
    lines = [_caption(found), "", line(heads), line(["---"] * 4 + ["---:"] * 3)]
    for row in found["rows"]:
        place = [row["model"], row["lengths"], str(row["batch"])]
        for engine, x in row["engines"].items():
            name = ENGINES.get(engine, engine)
            name += "" if "packed" in engine else ", padded"
            alone = x["us_a_token_alone"]
            lines.append(line([
                *place, name, f"{x['median_ms']:.1f}", f"{x['us_a_token']:.0f}",
                "-" if alone is None else f"{alone:.0f}",
            ]))  # fmt: skip
    return "\n".join(lines)


def decode_table(folder: Path) -> str:
    """A row for each model, dtype, batch and past: processor ms of a step by every engine."""
    found = read(folder, "decode")
    if not found:
        return NOT_YET
    engines = {e: ENGINES[e] for e in ENGINES if any(f"{e}_ms" in r for r in found["rows"])}
    by = lambda r: (r["model"], r["dtype"] != "float32", r["batch"], r["past"])  # noqa: E731
    rows, lines = sorted(found["rows"], key=by), list[str]()
    for what, end, shown in (
        ("A step", "_ms", {**engines, "floor": "the weights read once"}),
        ("The prompt, which gives the first token", "_first_ms", engines),
    ):
        heads = ["model", "dtype", "batch", "past", *shown.values()]
        lines += ["", f"{what}, processor ms:", "", line(heads),
                  line(["---"] * 2 + ["---:"] * (len(heads) - 2))]  # fmt: skip
        for row in rows:
            place = [str(row[k]) for k in ("model", "dtype", "batch", "past")]
            times = (row.get(f"{e}{end}") for e in shown)
            lines.append(line([*place, *("-" if ms is None else f"{ms:.1f}" for ms in times)]))
        lines += ["", _ratios(rows, end, engines)]
    return "\n".join([_caption(found), *lines])


def _ratios(rows: list[dict[str, Any]], end: str, engines: dict[str, str]) -> str:
    """Return what turbotx takes of every other engine's time, from the least row to the most."""
    parts = list[str]()
    for engine, name in engines.items():
        found = [r[f"turbotx{end}"] / r[f"{engine}{end}"] for r in rows if f"{engine}{end}" in r]
        if engine != "turbotx":
            parts.append(f"{min(found):.2f} to {max(found):.2f} ({name})")
    return f"turbotx's time over another engine's: {', '.join(parts)}."


TABLES = {
    "latency": latency_table, "stream": stream_table, "dispatch": dispatch_table,
    "fused_kernels": fused_table, "cold_start": cold_table,
}  # fmt: skip


def _caption(found: dict[str, Any]) -> str:
    machine = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['device']}, {count_threads(machine['threads'])}; {versions}."


def count_threads(count: int) -> str:
    return f"{count} thread{'s' if count != 1 else ''}"


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.1f}" if values else "-"


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
