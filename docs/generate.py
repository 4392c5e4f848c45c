"""Make what README and docs show: pictures of a real compile, plots and tables of results.

In: a random BERT, and benchmarks/results/*.json. Out: docs/images/*, and results.md, cpu.md,
gpu.md, scale.md, architectures.md, decoding.md, operators.md, packed.md, quantization.md and
triton.md with the tables between their marks replaced::

    python docs/generate.py
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import torch
from cpu_tables import ENGINES, count_threads, decode_table, latency_table, packed_table
from cpu_tables import TABLES as CPU_TABLES
from gpu_tables import GPU_TABLES, claims
from latency_plot import draw_latency
from proof_tables import operators_table, resources_table
from scale_tables import SCALE_TABLES

import turbotx
from turbotx.cli.bench.runner import QUIET_CORES
from turbotx.memory.planner.svg import plan_to_svg
from turbotx.report import Report
from turbotx.report.layers import find_layers, plan_of

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
BEGIN, END = "<!-- results: docs/generate.py -->", "<!-- end of results -->"
NOT_YET = "not yet measured"

# --- the picture: one layer before and after ------------------------------------------------

ROW, BOX, WIDTH, GAP, TOP = 19, 15, 250, 210, 56
COLOURS = {"gemm": "#e8a33d", "attention": "#5fae57", "kernel": "#4f8fd9", "none": "#b5b9c0"}
STYLE = """
  text { font: 11px system-ui, sans-serif; fill: #24292f; }
  .head { font-size: 14px; font-weight: 600; } .faint { fill: #6a7079; }
  .page { fill: #fff; } path { fill: none; stroke-width: 1.3; opacity: .75; }
  @media (prefers-color-scheme: dark) { .page { fill: #16181c; } text { fill: #e4e6ea; }
    .faint { fill: #9aa1ab; } }
"""


def explain_bert(layers: int) -> Report:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(num_hidden_layers=layers, vocab_size=1000)).eval()
    ids = torch.randint(5, 1000, (4, 128))
    optimized = turbotx.optimize(model, backend="aten")  # the plan is the same, nothing is built
    return turbotx.explain(optimized, input_ids=ids, attention_mask=torch.ones_like(ids))


def draw_layer(report: Report, layer: str) -> str:
    """Return one layer as SVG: every captured op on the left, the launches it became right."""
    ops = [n for n in report.origin.nodes if n.module.startswith(layer) and n.nbytes != 0]
    ops = [n for n in ops if n.kind == "call_function"]
    launches = [x for x in report.launches if x.module.startswith(layer)]
    height = TOP + ROW * len(ops) + 16
    step = (height - TOP - 16) / len(launches)
    middle = {x.name: TOP + step * (k + 0.5) for k, x in enumerate(launches)}
    total = 16 + WIDTH + GAP + 330 + 16
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" role="img" '
        f'aria-label="One BERT layer: {len(ops)} ops become {len(launches)} launches">',
        f'<style>{STYLE}</style><rect class="page" width="{total}" height="{height}"/>',
        f'<text class="head" x="16" y="26">{len(ops)} ops of one BERT layer, as captured</text>',
        f'<text class="head" x="{16 + WIDTH + GAP}" y="26">{len(launches)} launches</text>',
        f'<text class="faint" x="{16 + WIDTH + GAP}" y="42">at batch 4, length 128</text>',
    ]
    lines += _op_rows(report, ops, middle)
    for launch in launches:
        lines += _launch_box(launch, middle[launch.name])
    return "\n".join([*lines, "</svg>"]) + "\n"


def _op_rows(report: Report, ops: list[Any], middle: dict[str, float]) -> Iterator[str]:
    kinds = {x.name: x.kind for x in report.launches}
    for k, op in enumerate(ops):
        place = report.where(op.name)
        inside = [name for name in place.launches if name in middle]
        colour = COLOURS[kinds[inside[0]] if inside else "none"]
        y = TOP + ROW * k
        yield (
            f'<rect x="16" y="{y}" width="{WIDTH}" height="{BOX}" rx="3" fill="{colour}" '
            f'fill-opacity="{0.25 if place.status in ("view", "removed") else 0.6}"/>'
        )
        note = {"view": "only an index", "removed": "does nothing"}.get(place.status, "")
        yield f'<text x="24" y="{y + 11.5}">{escape(op.op)}</text>'
        right = 16 + WIDTH - 8
        yield f'<text class="faint" x="{right}" y="{y + 11.5}" text-anchor="end">{note}</text>'
        if inside and place.status != "view":
            x, end, mid = 16 + WIDTH, 16 + WIDTH + GAP, y + BOX / 2
            yield (
                f'<path stroke="{colour}" d="M{x} {mid} C{x + 90} {mid} {end - 90} '
                f'{middle[inside[0]]:.1f} {end} {middle[inside[0]]:.1f}"/>'
            )


def _launch_box(launch: Any, y: float) -> Iterator[str]:
    x = 16 + WIDTH + GAP
    moved = f"{launch.traffic.compulsory_nbytes / 2**20:.1f} MiB"
    name = f"{launch.name}, packed" if ".query" in launch.module else launch.name
    yield (
        f'<rect x="{x}" y="{y - 16:.1f}" width="330" height="32" rx="5" '
        f'fill="{COLOURS[launch.kind]}" fill-opacity=".75"/>'
    )
    yield f'<text x="{x + 10}" y="{y + 4:.1f}">{escape(name)}</text>'
    yield f'<text x="{x + 320}" y="{y + 4:.1f}" text-anchor="end">moves {moved}</text>'


def shoot_report(report: Report, picture: Path, at: str) -> None:
    """Write what a browser shows of report.html, opened at a box; say so where there is none."""
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if browser is None:
        print(f"{picture.name} is left as it was: it takes Chromium to make it")
        return
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        page.write_text(report.to_html(), encoding="utf-8")
        flags = ("--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1400,860")
        shot = f"--screenshot={picture}"
        subprocess.run([browser, *flags, shot, f"{page.as_uri()}#{at}"], check=True)


# --- the table ----------------------------------------------------------------------------


def results_table(folder: Path = RESULTS) -> str:
    """Return the table as Markdown, a row a claim; what has no result says so."""
    rows = ["| claim | result | measured by |", "|---|---|---|"]
    for file, maker in (
        ("memory", _memory_rows),
        ("cpu_kernels", _kernel_rows),
        ("latency", _latency_rows),
        ("cold_start", _cold_rows),
        ("saved_model", _saved_rows),
        ("serving_sim", _serving_rows),
        ("serving_minilm", _server_rows),
    ):
        path = folder / f"{file}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        script = f"{file}.py".replace("_minilm.py", ".py minilm")
        rows += [f"| {what} | {result} | `benchmarks/{script}` |" for what, result in maker(found)]
    rows += [
        f"| {what} | {result} | `benchmarks/gpu.py figures` |" for what, result in claims(folder)
    ]
    return "\n".join(rows)


def _memory_rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    what = "Planned memory over the lower bound, all shapes of all launch lists (worst)"
    grid = found.get("grid", {}).get("rows", [])
    if grid:
        worst = max(r["symbolic"]["worst"] for r in grid)
        shapes = sum(r["symbolic"]["shapes"] for r in grid)
        paper = max(r["chunked_cold"]["mean"] for r in grid)
        yield (
            what,
            f"{worst:.4f} x over {shapes:,} shapes; the paper's chunks, mean: up to {paper:.2f} x",
        )
    else:
        yield what, NOT_YET
    stream = found.get("stream", {}).get("rows", [])
    what = "Allocations from the system in a stream of 500 requests of random lengths"
    if stream:
        ways = stream[0]["ways"]
        parts = [f"{name} {ways[name]['device_allocations']}" for name in ways if "," not in name]
        yield what, ", ".join(parts)
    else:
        yield what, NOT_YET


def _kernel_rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for part, title in (
        ("gemm_float32", "Packed float32 GEMM on a CPU"),
        ("gemm_bfloat16", "Packed bfloat16 GEMM on a CPU"),
        ("attention", "Attention on a CPU"),
    ):
        ratios = [_ahead(row["engines"]) for row in found.get(part, {}).get("rows", [])]
        if not ratios:
            yield title, NOT_YET
            continue
        machine = found[part]["machine"]
        yield (
            title,
            f"{statistics.median(ratios):.2f} x the speed of the fastest of PyTorch's ways (median "
            f"of {len(ratios)} sizes, worst {min(ratios):.2f} x; {machine['device']}, "
            f"{machine['threads']} threads, preliminary)",
        )


def _latency_rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """One row a model and dtype; what was measured while others used the cores is left out."""
    models: dict[tuple[str, str], list[dict[str, float]]] = {}
    for row in found.get("rows", []):
        quiet = {e: x for e, x in row["engines"].items() if x["others_cores"] <= QUIET_CORES}
        if "turbotx" in quiet:
            medians = {e: x["median_ms"] for e, x in quiet.items()}
            models.setdefault((row["model"], row["dtype"]), []).append(medians)
    if not models:
        yield "Latency of whole models on a CPU", NOT_YET
    for (model, dtype), rows in models.items():
        parts = []
        for engine in dict.fromkeys(e for r in rows for e in r if e != "turbotx"):
            ratios = [r[engine] / r["turbotx"] for r in rows if engine in r]
            parts.append(f"{_times_faster(ratios)} than {ENGINES.get(engine, engine)}")
        machine, shapes = found["machine"], f"{len(rows)} shape{'s' if len(rows) > 1 else ''}"
        yield (
            f"Latency of {model} in {dtype} on a CPU",
            f"{'; '.join(parts)} ({shapes}; {machine['device']}, "
            f"{count_threads(machine['threads'])})",
        )


def _times_faster(ratios: list[float]) -> str:
    """Return by how much turbotx is ahead, from the least to the most; below 1 it is behind."""
    ends = dict.fromkeys((f"{min(ratios):.2f}", f"{max(ratios):.2f}"))
    return f"{' to '.join(ends)} x faster"


def _cold_rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    what = "First call of MiniLM on a CPU, capture included"
    times = [f"{found[c]['first_call_ms'] / 1e3:.1f} s" for c in ("empty", "warm") if found]
    yield what, f"{times[0]} with an empty cache, {times[1]} with a warm one" if times else NOT_YET


def _saved_rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    what = "A saved MiniLM, from the file to its first result in a fresh process without a compiler"
    yield what, f"{found['median']['file_to_first_result_ms']:.0f} ms" if found else NOT_YET


def _ahead(engines: dict[str, Any]) -> float:
    """How many times as fast turbotx is as the fastest other engine without an epilogue."""
    others = [e["median_us"] for n, e in engines.items() if n != "turbotx" and "+bias" not in n]
    return min(others) / engines["turbotx"]["median_us"]


def _serving_rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    what = "Batching of variable lengths, simulated: mean latency over the clairvoyant optimum"
    mean = found.get("small", {}).get("mean", {})
    if mean:
        names = {"aged": "turbotx", "dp": "the paper's DP", "fifo": "first come, first served"}
        yield what, ", ".join(f"{name} {mean[key]:.2f} x" for key, name in names.items())
    else:
        yield what, NOT_YET


def _server_rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    what = "Requests per second of the HTTP server: MiniLM, texts of 5 to 500 tokens, all at once"
    rows = {(r["server"], r.get("policy")): r["all_at_once_per_s"] for r in found.get("rows", [])}
    if rows:
        names = {
            ("turbotx serve, turbotx model", "aged"): "turbotx",
            ("turbotx serve, eager model", "single"): "PyTorch eager behind the same server",
            ("sentence-transformers, encode of all", None): "sentence-transformers' own encode",
        }
        parts = ", ".join(f"{name} {rows[key]:.1f}" for key, name in names.items())
        yield what, f"{parts} ({found['device']}, {found['cores']} cores)"
    else:
        yield what, NOT_YET


# --- architectures ------------------------------------------------------------------------


def architectures_table(folder: Path = RESULTS) -> str:
    """Return docs/architectures.md's table: a row an architecture, footnotes for the reasons."""
    path = folder / "architectures.json"
    if not path.exists():
        return NOT_YET
    found = json.loads(path.read_text())
    shapes = ", ".join(f"{r['batch']} x {r['seq']}" for r in found["models"][0]["rows"])
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    rows = [
        f"Batch x length {shapes}; {versions}; {found['device']}.",
        "",
        "| architecture | dtype | error: eager | turbotx | launches a layer | split | ATen |",
        "|---|---|---|---|---|---|---|",
    ]
    notes: dict[str, int] = {}
    for model in found["models"]:
        eager, ours = (max(r[who] for r in model["rows"]) for who in ("eager", "turbotx"))
        failing = "" if all(r["passes"] for r in model["rows"]) else " **breaks the rule**"
        split = [notes.setdefault(reason, len(notes) + 1) for reason in model["split"]]
        externs = "; ".join(f"`{op}`: {why}" for op, why in model["externs"].items())
        rows.append(
            f"| {model['architecture']} | {model['dtype']} | {eager:.1e} | {ours:.1e}{failing} "
            f"| {_launches(model['layer'])} | {', '.join(f'({k})' for k in split) or 'none'} "
            f"| {externs or 'none'} |"
        )
    return "\n".join([*rows, "", *(f"({k}) {reason}" for reason, k in notes.items())])


def _launches(layer: dict[str, int]) -> str:
    words = {"gemm": "GEMMs", "attention": "attention", "kernel": "fused", "aten": "ATen"}
    parts = [f"{layer[kind]} {word}" for kind, word in words.items() if kind in layer]
    return f"{sum(layer.values())}: {', '.join(parts)}"


def write_between(text: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """Return the page with what stands between two marks replaced."""
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{table}\n{end}{after}"


def write_marked(text: str, name: str, table: str) -> str:
    """Return the page with the table of that name replaced."""
    marks = f"<!-- {name}: docs/generate.py -->", f"<!-- end of {name} -->"
    return write_between(text, table, *marks)


def pages(folder: Path = RESULTS) -> dict[Path, str]:
    """Return the pages with the tables between their marks made from the results of `folder`."""
    results = DOCS / "results.md"
    found = {results: write_between(results.read_text(), results_table(folder))}
    tables = [
        ("results", "latency", latency_table(folder)),
        ("architectures", "architectures", architectures_table(folder)),
        ("operators", "operators", operators_table(folder)),
        ("quantization", "latency_int8", latency_table(folder, "latency_int8")),
        ("scale", "latency_unpacked", latency_table(folder, "latency_unpacked")),
        ("triton", "resources", resources_table(folder)),
        ("packed", "packed", packed_table(folder)),
        ("decoding", "decode", decode_table(folder)),
    ]
    for page, makers in (("cpu", CPU_TABLES), ("gpu", GPU_TABLES), ("scale", SCALE_TABLES)):
        tables += [(page, mark, make(folder)) for mark, make in makers.items()]
    for page, mark, table in tables:
        path = DOCS / f"{page}.md"
        text = found[path] if path in found else path.read_text()
        found[path] = write_marked(text, mark, table)
    return found


def main() -> None:
    images = DOCS / "images"
    images.mkdir(exist_ok=True)
    (images / "layer.svg").write_text(draw_layer(explain_bert(1), "encoder.layer.0"))
    report = explain_bert(4)
    (images / "memory.svg").write_text(plan_to_svg(plan_of(report.memory), find_layers(report)))
    shoot_report(report, images / "report.png", "memory")
    draw_latency(RESULTS, images / "latency.svg")
    for path, text in pages().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
