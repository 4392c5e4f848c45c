"""The tables of docs/serving.md: the options of the command, and what the benchmarks measured.

In: `turbotx serve`'s parser, benchmarks/results/serving*.json. Out: docs/serving.md with what
stands between each pair of marks replaced::

    python docs/serving_tables.py
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from turbotx.cli.serve import PANELS, serve_command

DOCS = Path(__file__).parent
PAGE = DOCS / "serving.md"
RESULTS = DOCS.parent / "benchmarks" / "results"


def write_tables(text: str, folder: Path = RESULTS) -> str:
    """Return the page with every marked table made anew."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}: docs/serving_tables.py -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}{make(folder)}\n{end}{rest.split(end)[1]}"
    return text


def options_table(_: Path) -> str:
    """Every option of `turbotx serve`, by panel, with its default."""
    hints = get_type_hints(serve_command, include_extras=True)
    rows = []
    for name, parameter in inspect.signature(serve_command).parameters.items():
        kind, option = hints[name].__origin__, hints[name].__metadata__[0]
        if name != "models":
            rows.append(_option_row(name, kind, option, parameter.default))
    rows.sort(key=lambda row: PANELS.index(row[0]))
    return table(("panel", "option", "default", "what it does"), rows)


def _option_row(name: str, kind: Any, option: Any, default: Any) -> tuple[str, ...]:
    flag = name.replace("_", "-")
    names = f"`--{flag}`"
    if kind in (bool, bool | None):
        names += f", `--no-{flag}`"
    if option.envvar:
        names += f", `{option.envvar}`"
    literals = [kind, *get_args(kind)]
    choices = [c for k in literals if get_origin(k) is Literal for c in get_args(k)]
    text = option.help + (f" One of {', '.join(choices)}." if choices else "")
    said = "" if default is None else str(default)
    if isinstance(default, bool):
        said = "on" if default else "off"
    elif isinstance(default, int | float) and name != "port":
        said = f"{default:,g}" if isinstance(default, float) else f"{default:,}"
    return option.rich_help_panel, names, said, text


def optimum_table(folder: Path) -> str:
    found = _read(folder, "serving_sim")["small"]
    names = {"aged": "aged", "dp": "paper's DP", "sort": "sort and slice", "fifo": "FIFO"}
    rows = [(f"{r['load']}", *(f"{r[k]['mean']:.3f}" for k in names)) for r in found["rows"]]
    rows.append(("mean", *(f"{found['mean'][k]:.3f}" for k in names)))
    return table(("load", *names.values()), rows)


def sustained_table(folder: Path) -> str:
    found = _read(folder, "serving_sim")["sustained"]
    names = {"aged": "aged", "dp": "paper's DP", "sort": "sort and slice", "fifo": "FIFO"}
    rows = [
        (f"{count:,}", *(f"{found[f'{k}, {count} requests']:.3f}" for k in names))
        for count in (1000, 20_000)
    ]
    return table(("requests", *names.values()), rows)


def padding_table(folder: Path) -> str:
    rows = []
    for r in _read(folder, "serving_sim")["padding"]:
        times = [f"{r[f'p{q}_ms at {load}']:,.0f}" for load in (0.5, 0.8, 0.95) for q in (50, 99)]
        rows.append((r["machine"], r["lengths"], r["padding"], r["policy"],
                     f"{r['all_at_once_per_s']:.1f}", *times))  # fmt: skip
    heads = [f"p{q} at {load}" for load in (0.5, 0.8, 0.95) for q in (50, 99)]
    return table(("machine", "tokens", "batches", "policy", "all at once, per s", *heads), rows)


def server_padding_table(folder: Path) -> str:
    if not (folder / "serving_padding.json").exists():
        return "Not measured yet."
    found = _read(folder, "serving_padding")
    rows = [
        (
            r["lengths"], r["server"], f"{r['all_at_once_per_s']:.1f}", f"{r['p50_ms']:.0f}",
            f"{r['p99_ms']:.0f}", f"{r['cores_used_by_others']:.1f}",
        )
        for r in found["rows"]
    ]  # fmt: skip
    heads = ("tokens", "batches", "all at once, per s", "p50 ms", "p99 ms", "cores others used")
    return f"{table(heads, rows)}\n\n{found['parameters']['count']} texts a row."


def loopback_table(folder: Path) -> str:
    rows = [
        (
            f"{r['load']}", r["policy"], f"{r['per_s']:.1f}", f"{r['per_s_ratio']:.3f}",
            f"{r['p99_ms']:.0f}", f"{r['p99_ratio']:.3f}",
        )
        for r in _read(folder, "serving_sleep")["rows"]
    ]  # fmt: skip
    heads = ("load", "policy", "per s", "over simulated", "p99 ms", "over simulated")
    return table(heads, rows)


def minilm_table(folder: Path) -> str:
    figures = ("p50_ms", "p99_ms", "simulated_p99_ms")
    found = _read(folder, "serving_minilm")
    peer = found["measured"]["sentence-transformers"]["cores_used_by_others"]
    rows = [
        (
            r["server"], r.get("policy", ""), f"{r['all_at_once_per_s']:.1f}",
            *(f"{r[k]:.0f}" if k in r else "" for k in figures),
            f"{r.get('cores_used_by_others', peer):.1f}",
        )
        for r in found["rows"]
    ]  # fmt: skip
    heads = ("server", "policy", "all at once, per s", "p50 ms", "p99 ms", "simulated p99 ms",
             "cores others used")  # fmt: skip
    count = found["parameters"]["count"]
    return f"{table(heads, rows)}\n\n{count} texts a row."


def overload_table(folder: Path) -> str:
    found = _read(folder, "serving_overload")
    rows = [
        (
            f"{r['load']:g}", f"{r['steady_per_s']:.1f}", f"{r['answered']:,}",
            f"{r['refused']:,}", f"{r['other']}", f"{r['p99_ms']:.0f}",
            f"{r['refused_p50_ms']:.1f}" if "refused_p50_ms" in r else "",
            f"{r['refused_p99_ms']:.1f}" if "refused_p99_ms" in r else "",
        )
        for r in found["rows"]
    ]  # fmt: skip
    heads = ("load", "goodput per s", "answered", "429", "neither", "p99 ms", "429 p50 ms",
             "429 p99 ms")  # fmt: skip
    seconds = found["parameters"]["seconds"]
    return f"{table(heads, rows)}\n\nTen times the capacity came for {seconds:.0f} s."


def clients_table(folder: Path) -> str:
    found = _read(folder, "serving_clients")
    idle = found["rows"][0]["idle_resident_nbytes"]
    rows = [
        (
            r["beside"], *(f"{r[f'{path}_p{q}_ms']:.0f}" for path in ("embed", "health")
                           for q in (50, 99)),
            f"{r['not_answered']} of {r['asked']}",
            f"{r['indexed_per_s']:.0f}" if "indexed_per_s" in r else "",
            f"{r['peak_resident_nbytes'] / idle:.2f}", f"{r['cores_used_by_others']:.1f}",
        )
        for r in found["rows"]
    ]  # fmt: skip
    heads = ("beside", "/embed p50 ms", "p99 ms", "/health p50 ms", "p99 ms", "not answered",
             "indexed per s", "memory over idle", "cores others used")  # fmt: skip
    restart = found["restart"]
    said = f"From SIGKILL to the next process's `/ready`: {restart['ready_s']:.1f} s."
    return f"{table(heads, rows)}\n\n{said}"


def host_table(folder: Path) -> str:
    """CPU time of the server's process for a text, by clients."""
    path = folder / "serving_host.json"
    if not path.exists():
        return "not yet measured"
    found = json.loads(path.read_text())
    rows = (
        (f"{r['clients']}, `{r['what']}`", f"{r['loop_us']:,.0f}", f"{r['others_us']:,.0f}",
         f"{r['us']:,.0f}", f"{r['ms']:.1f}", f"{r['rows']:.0f}")
        for r in found["rows"] if r["what"].startswith("/")
    )  # fmt: skip
    heads = ("clients, path", "event loop, µs", "other threads", "all", "a request, ms",
             "texts a batch")  # fmt: skip
    return f"{table(heads, rows)}\n\n({found['machine']['device']})"


TABLES: dict[str, Callable[[Path], str]] = {
    "host": host_table,
    "options": options_table,
    "optimum": optimum_table,
    "sustained": sustained_table,
    "padding": padding_table,
    "loopback": loopback_table,
    "overload": overload_table,
    "clients": clients_table,
    "minilm": minilm_table,
    "server padding": server_padding_table,
}


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown, a line a row."""
    heads = tuple(heads)
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


if __name__ == "__main__":
    PAGE.write_text(write_tables(PAGE.read_text()))
