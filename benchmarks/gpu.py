"""Everything that turbotx claims of a GPU, measured on the one that is here.

Out: benchmarks/results/gpu.json, written after every measurement, and tables. Runs from a checkout;
what the budget has no room for is skipped and listed, and can be measured by a later run::

    PYTHONPATH=. python benchmarks/gpu.py --budget 480
    PYTHONPATH=. python benchmarks/gpu.py --only 'latency/bert-base/fp16/1x40'
    PYTHONPATH=. python benchmarks/gpu.py --dry-run        # needs no GPU: what it would measure
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from gpu_models import ENGINES, MODELS, SHAPES, VARIANTS  # noqa: E402

GEMMS = ("turbotx-triton", "turbotx-cublas", "turbotx-triton-pdl")
NORMS = ("turbotx-fold", "turbotx-store")
RESULTS = Path(__file__).parent / "results" / "gpu.json"
TARGETS = {"NVIDIA H100": {"1x40": 260.0, "32x128": 1350.0}}  # µs, BERT-base fp16


@dataclass(frozen=True)
class Measurement:
    """name: path-like, for --only. seconds: what it is expected to take."""

    name: str
    seconds: float
    run: Callable[[], dict[str, Any]]


def plan_measurements() -> list[Measurement]:
    """All measurements, in the order of their worth: correctness, the claims, then the rest."""
    import gpu_gemms
    import gpu_measurements as m
    from gpu_timing import measure_ceilings

    found = [Measurement("device/ceilings", 5, measure_ceilings)]

    def add(name: str, seconds: float, run: Callable[..., dict[str, Any]], *args: Any) -> None:
        found.append(Measurement(name, seconds, partial(run, *args)))

    dtypes = ("fp16", "bf16")
    for name in MODELS:
        for dtype in dtypes if name == "bert-base" else dtypes[:1]:
            add(f"kernels-right/{name}/{dtype}", 6, m.check_kernels, name, dtype)
            add(f"model-right/{name}/{dtype}", 5, m.check_model, name, dtype)
    for engine in GEMMS:
        for name in ("bert-base", "gpt2"):
            add(f"gemms-right/{name}/fp16/{engine}", 6, m.check_model, name, "fp16", engine)
    for engine in NORMS:
        for name in ("bert-base", "gpt2", "llama"):
            add(f"norms-right/{name}/fp16/{engine}", 6, m.check_model, name, "fp16", engine)
    add("cold-start/bert-base/fp16", 20, m.measure_cold_start, "bert-base", "fp16")
    seconds = dict(zip(ENGINES, (8, 3, 4, 30, 35, 150), strict=True))
    for engine in ENGINES[:5]:
        _add_latency(add, "bert-base", "fp16", (1, 40), engine, seconds[engine])
    for engine in ENGINES[:3]:
        _add_latency(add, "bert-base", "fp16", (32, 128), engine, seconds[engine])
    for engine in VARIANTS:
        _add_latency(add, "bert-base", "fp16", (1, 40), engine, 8)
    lengths = [(1, n) for n in m.LENGTHS]
    add("lengths/bert-base/fp16", 14, m.measure_shapes, "bert-base", "fp16", lengths)
    add("stream/bert-base/fp16", 30, m.measure_stream, "bert-base", "fp16", 1000)
    _add_gemms(add, gpu_gemms.WIDTHS[:1], GEMMS[:2])
    for name in ("bert-base", "gpt2", "llama"):
        for engine in NORMS:
            label = f"norms/{name}/fp16/{engine}"
            add(label, 6, gpu_gemms.measure_norms, name, "fp16", engine)
    for size, engine, cost in (
        ("large", "turbotx", 3), ("large", "torch", 1), ("large", "inductor", 7),
        ("short", "turbotx", 3), ("short", "torch", 1), ("short", "inductor", 7),
    ):  # fmt: skip
        for function in ("softmax", "layer_norm"):
            for width in (768, 1024, 4096):
                label = f"{function}/{width}/fp16/{size}/{engine}"
                add(label, cost, m.measure_function, function, width, "fp16", engine,
                    size == "large")  # fmt: skip
    _add_gemms(add, gpu_gemms.WIDTHS, GEMMS)
    add("tuned/bert-base/fp16/1x40", 90, gpu_gemms.measure_tuned, "bert-base", "fp16", (1, 40))
    for shape in ((1, 40), (32, 128), (1, 512)):
        label = f"kernel-times/bert-base/fp16/{shape[0]}x{shape[1]}"
        add(label, 12, m.measure_kernels, "bert-base", "fp16", shape)
    for name in MODELS:
        for dtype in dtypes:
            add(f"shapes/{name}/{dtype}", 16, m.measure_shapes, name, dtype, SHAPES)
    for name in MODELS:
        for dtype in dtypes:
            for shape in SHAPES:
                for engine in ENGINES[2:]:
                    _add_latency(add, name, dtype, shape, engine, seconds[engine])
    for name in MODELS:
        for dtype in dtypes[1:] if name != "bert-base" else ():
            add(f"kernels-right/{name}/{dtype}", 6, m.check_kernels, name, dtype)
            add(f"model-right/{name}/{dtype}", 5, m.check_model, name, dtype)
    first: dict[str, Measurement] = {}
    for measurement in found:
        first.setdefault(measurement.name, measurement)
    return list(first.values())


def _add_gemms(
    add: Callable[..., None], widths: Sequence[tuple[int, int]], engines: Sequence[str]
) -> None:
    """Feed-forward blocks at every bucket of tokens."""
    import gpu_gemms

    for hidden, inner in widths:
        for engine in engines:
            label = f"gemms/{hidden}x{inner}/fp16/{engine}"
            add(label, 14, gpu_gemms.measure_blocks, hidden, inner, "fp16", engine)


def _add_latency(
    add: Callable[..., None],
    name: str,
    dtype: str,
    shape: tuple[int, int],
    engine: str,
    cost: float,
) -> None:
    import gpu_measurements as m

    label = f"latency/{name}/{dtype}/{shape[0]}x{shape[1]}/{engine}"
    add(label, cost, m.measure_latency, name, dtype, shape, engine)


def choose(measurements: list[Measurement], only: str) -> list[Measurement]:
    """Those whose names begin with, or match, `only`."""
    return [x for x in measurements if x.name.startswith(only) or fnmatch.fnmatch(x.name, only)]


def run_all(
    measurements: list[Measurement], budget_s: float, out: Path, clock: Callable[[], float]
) -> dict[str, Any]:
    """Measure until the budget is spent; a measurement that fails is kept as its error."""
    begin = clock()
    record = {"device": describe_device(), "results": {}, "failed": {}, "skipped": []}
    if out.exists():  # a later run adds to an earlier one of the same device and versions
        known = json.loads(out.read_text())
        if known["device"] == record["device"]:
            record["results"] = known["results"]
    for measurement in measurements:
        left = budget_s - (clock() - begin)
        if measurement.seconds > left:
            record["skipped"].append(measurement.name)
            continue
        started = clock()
        try:
            found = measurement.run()
            record["results"][measurement.name] = found
            print(f"{clock() - started:6.1f} s  {measurement.name}  {shorten(found)}", flush=True)
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            record["failed"][measurement.name] = text[-4000:]
            print(
                f"FAILED    {measurement.name}: {type(error).__name__}: {error}"[:400], flush=True
            )
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
    return record


def shorten(found: dict[str, Any]) -> str:
    """The numbers of a measurement on one line."""
    plain = {k: v for k, v in found.items() if not isinstance(v, (dict, list))}
    return ", ".join(f"{k} {v}" for k, v in plain.items())[:160]


def describe_device() -> dict[str, Any]:
    import transformers
    import triton

    versions = {
        "torch": torch.__version__, "triton": triton.__version__,
        "transformers": transformers.__version__, "cuda": torch.version.cuda or "none",
    }  # fmt: skip
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"name": name, "versions": versions}


def summarize(record: dict[str, Any]) -> list[str]:
    """The claims and what was measured of them, as lines of text."""
    results, lines = record["results"], []
    ceilings = results.get("device/ceilings", {})
    lines.append(f"{record['device']['name']}: {shorten(ceilings)}")
    wrong = [n for n, r in results.items() if "-right/" in n and not r["holds"]]
    right = sum("-right/" in n for n in results)
    lines.append(
        f"right: {right - len(wrong)} of {right}" + "".join(f"\n  WRONG {n}" for n in wrong)
    )
    for name, row in results.items():
        if name.startswith("latency/") and name.endswith("/turbotx"):
            lines += _latency_lines(name, row, results, ceilings)
        elif name.startswith(("softmax/", "layer_norm/")):
            share = row["gb_per_s"] / ceilings["copy_gb_per_s"] if ceilings else 0.0
            lines.append(f"{name:42} {row['us']:9.1f} µs  {share:6.1%} of copy")
        elif name.startswith(("shapes/", "lengths/")):
            lines.append(name)
            for shape, pair in row["rows"].items():
                ours, eager = pair["turbotx"], pair["eager"]
                floor = _floor_us(row, ceilings)
                lines.append(
                    f"  {shape:7} {ours['latency_us']:9.1f} µs, in a row {ours['row_us']:9.1f} µs,"
                    f" eager {eager['latency_us']:9.1f} µs, floor {floor / ours['row_us']:6.1%}"
                )
        elif name.startswith("norms/") and name.endswith("/turbotx-fold"):
            lines += _norm_lines(name.removesuffix("/turbotx-fold"), results)
        elif name.startswith("gemms/") and name.endswith("/turbotx-triton"):
            lines += _gemm_lines(name.removesuffix("/turbotx-triton"), results)
        elif name.startswith(("stream/", "cold-start/", "tuned/")):
            lines.append(f"{name}: {json.dumps(row)[:300]}")
    lines += [f"failed: {name}" for name in record["failed"]]
    skipped = record["skipped"]
    lines.append(f"skipped for lack of time: {len(skipped)}" + "".join(f"\n  {n}" for n in skipped))
    return lines


def _latency_lines(
    name: str, row: dict[str, Any], results: dict[str, Any], ceilings: dict[str, float]
) -> list[str]:
    """turbotx at one shape, the floor's share, and every engine beside it."""
    place = name.removesuffix("/turbotx")
    share = _floor_us(row, ceilings) / row["row_us"]
    lines = [
        f"{place}: turbotx {row['latency_us']:.1f} µs, in a row {row['row_us']:.1f} µs, "
        f"{share:.1%} of the weight-streaming floor's rate, "
        f"{(row['peak_nbytes'] + row.get('arena_nbytes', 0)) / 2**20:.1f} MiB"
    ]
    for device, targets in TARGETS.items():
        target = targets.get(place.rsplit("/", 1)[-1])
        if target and is_device(device) and "/bert-base/fp16/" in place:
            lines.append(
                f"  target {target:.0f} µs: {'met' if row['row_us'] <= target else 'missed'}"
            )
    for engine in (*ENGINES[1:], *VARIANTS):
        other = results.get(f"{place}/{engine}")
        if other:
            lines.append(
                f"  {engine:24} {other['latency_us']:9.1f} µs, in a row {other['row_us']:9.1f} µs: "
                f"{other['latency_us'] / row['latency_us']:.2f} x and "
                f"{other['row_us'] / row['row_us']:.2f} x"
            )
    return lines


def _gemm_lines(place: str, results: dict[str, Any]) -> list[str]:
    """A block of two GEMMs at every bucket of tokens, by each that ran it."""
    found = {e: results[f"{place}/{e}"]["rows"] for e in GEMMS if f"{place}/{e}" in results}
    lines = [place]
    for tokens in found["turbotx-triton"]:
        times = (f"{e} {rows[tokens]['block_us']:8.2f} µs" for e, rows in found.items())
        lines.append(f"  {tokens:>5} tokens: " + ", ".join(times))
    return lines


def _norm_lines(place: str, results: dict[str, Any]) -> list[str]:
    """Four layers at every bucket of tokens, with norms folded and stored."""
    found = {e: results[f"{place}/{e}"]["rows"] for e in NORMS if f"{place}/{e}" in results}
    lines = [place]
    for tokens in found["turbotx-fold"]:
        times = (
            f"{e} {rows[tokens]['row_us']:8.2f} µs in a row, {rows[tokens]['launches']} launches"
            for e, rows in found.items()
        )
        lines.append(f"  {tokens:>5} tokens: " + "; ".join(times))
    return lines


def is_device(device: str) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_name().startswith(device)


def _floor_us(row: dict[str, Any], ceilings: dict[str, float]) -> float:
    """Time to read the weights once at the measured copy bandwidth."""
    rate = ceilings.get("copy_gb_per_s", 0.0)
    return row["streamed_nbytes"] / rate / 1e3 if rate else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for everything")
    parser.add_argument("--only", default="", help="the begin of names, or a pattern with *")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="list, and measure nothing")
    options = parser.parse_args()
    begin = time.perf_counter()
    chosen = choose(plan_measurements(), options.only)
    if options.dry_run:
        spent = 0.0
        for x in chosen:
            fits = spent + x.seconds <= options.budget
            spent += x.seconds if fits else 0.0
            print(f"{'' if fits else 'skipped':8} {x.seconds:5.0f} s  {x.name}")
        print(f"{len(chosen)} measurements, {spent:.0f} s of a budget of {options.budget:.0f} s")
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device here: --dry-run lists what would be measured", file=sys.stderr)
        return 3
    budget = options.budget - (time.perf_counter() - begin)
    record = run_all(chosen, budget, options.out, time.perf_counter)
    print("\n".join(["", *summarize(record)]))
    wrong = any("-right/" in n and not r["holds"] for n, r in record["results"].items())
    return int(wrong or bool(record["failed"]))


if __name__ == "__main__":
    raise SystemExit(main())
