"""The README's plot: a call of whole models on a CPU beside other engines, lower is better.

In: benchmarks/results/latency.json. Out: an SVG, one group of bars a shape, each engine's time at
its best settings as a share of PyTorch eager's on the same inputs::

    draw_latency(Path("benchmarks/results"), Path("docs/images/latency.svg"))
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from cpu_tables import count_threads

ENGINES = {
    "PyTorch eager": ("#b5b9c0", ("eager",)),
    "torch.compile": ("#e8a33d", ("compile", "compile-dynamic")),
    "ONNX Runtime": ("#5fae57", ("onnxruntime", "onnxruntime-optimized")),
    "OpenVINO": ("#a45ad0", ("openvino",)),
    "turbotx": ("#2f6fd0", ("turbotx",)),
}
"""The engines that are drawn where they were measured, in this order: a colour, and the settings of
which each shape's fastest is shown."""

MODELS = {"minilm": "MiniLM-L6, float32", "bert-base": "BERT-base, float32"}


def shares(found: dict[str, Any], model: str) -> dict[str, dict[str, float]]:
    """Return, by shape, every engine's median time over eager's; float32 rows."""
    table = {}
    for row in found["rows"]:
        if (row["model"], row["dtype"]) == (model, "float32") and "eager" in row["engines"]:
            ms = {setting: x["median_ms"] for setting, x in row["engines"].items()}
            table[row["shape"].replace("x", " x ")] = {
                engine: min(ms[s] for s in settings if s in ms) / ms["eager"]
                for engine, (_, settings) in ENGINES.items()
                if any(s in ms for s in settings)
            }
    return table


def drawn_from(folder: Path) -> str:
    """Return what the picture says of its source, which tells whether it is of these results."""
    digest = hashlib.sha256((folder / "latency.json").read_bytes()).hexdigest()
    return f"latency.json, SHA-256 {digest}"


def draw_latency(folder: Path, picture: Path) -> None:
    """Write the plot; nothing where there are no results."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "turbotx"  # equal results are equal files
    from matplotlib import pyplot

    path = folder / "latency.json"
    if not path.exists():
        return
    found = json.loads(path.read_text())
    figure, panels = pyplot.subplots(1, len(MODELS), figsize=(10, 3.2), sharey=True)
    for panel, (model, title) in zip(panels, MODELS.items(), strict=True):
        table = shares(found, model)
        engines = [e for e in ENGINES if any(e in row for row in table.values())]
        width = 0.84 / len(engines)
        for k, engine in enumerate(engines):
            places = [i + (k - (len(engines) - 1) / 2) * width for i in range(len(table))]
            heights = [row.get(engine, 0.0) for row in table.values()]
            bars = panel.bar(places, heights, width * 0.92, color=ENGINES[engine][0], label=engine)
            if engine == "turbotx":
                panel.bar_label(bars, [f"{h:.2f}" for h in heights], fontsize=7, padding=1)
        panel.set_xticks(range(len(table)), list(table))
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("batch x length", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("time / eager's time", fontsize=9)
    panels[-1].legend(fontsize=8, frameon=False, ncol=2, loc="upper center")
    panels[-1].set_ylim(0, 1.35)
    machine = found["machine"]
    device = f"{machine['device']}, {count_threads(machine['threads'])}"
    figure.suptitle(f"Time of a call, lower is better ({device})", fontsize=11)
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    about = {"Date": None, "Description": drawn_from(folder)}
    figure.savefig(picture, metadata=about, facecolor="white")
    pyplot.close(figure)
