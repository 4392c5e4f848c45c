"""The tables of docs/gpu.md, and rows of docs/results.md: what `benchmarks/gpu.py` measured.

In: benchmarks/results/gpu.json. Out: Markdown for the pages, one table a name, losing rows too::

    GPU_TABLES["gpu_latency"](Path("benchmarks/results"))
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NOT_YET = "not yet measured"
ENGINES = {
    "turbotx": "turbotx", "eager": "eager", "eager-graphs": "eager in a CUDA graph",
    "compile": "torch.compile", "compile-reduce-overhead": "torch.compile, reduce-overhead",
}  # fmt: skip
Rows = dict[str, dict[str, Any]]


def read(folder: Path) -> tuple[str, Rows]:
    """Return the device with its versions, and what is to be said of the run, in words; and all
    rows by name."""
    path = folder / "gpu.json"
    if not path.exists():
        return "", {}
    found = json.loads(path.read_text())
    device, versions = found["device"]["name"], found["device"]["versions"]
    words = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers"))
    note = found.get("note", "")
    return f"{device}; {words}. {note}".rstrip(), found["results"]


def latency_rows(folder: Path) -> str:
    """One model at the shapes that every engine ran."""
    device, rows = read(folder)
    table = [f"BERT-base, float16, medians in us. {device}", "", *LATENCY_HEAD]
    return "\n".join([*table, *_latencies(rows, "latency/bert-base/fp16")])


LATENCY_HEAD = (
    "| batch x length | engine | one call | calls in a row | host | over turbotx, in a row |",
    "|---|---|---:|---:|---:|---:|",
)


def _latencies(rows: Rows, prefix: str) -> list[str]:
    table = []
    for place in _places(rows, rf"{prefix}/(\d+x\d+)/turbotx"):
        own = rows[f"{prefix}/{place}/turbotx"]
        for engine, words in ENGINES.items():
            row = rows.get(f"{prefix}/{place}/{engine}")
            if row is not None:
                ahead = f"{row['row_us'] / own['row_us']:.2f} x" if row is not own else ""
                table.append(
                    f"| {place.replace('x', ' x ')} | {words} | {row['latency_us']:,.0f} | "
                    f"{row['row_us']:,.0f} | {row['host_us']:,.0f} | {ahead} |"
                )
    return table


def program_rows(folder: Path) -> str:
    """Bare replays: both programs at every length, and what dependent launches make of them."""
    _, rows = read(folder)
    table = ["| tokens | as chosen | norms folded | norms stored |", "|---:|---:|---:|---:|"]
    for place in _places(rows, r"norms/bert-base/fp16/1x(\d+)"):
        row = rows[f"norms/bert-base/fp16/1x{place}"]
        table.append(f"| {place} | {row['default']:.0f} | {row['fold']:.0f} | {row['store']:.0f} |")
    ways = {
        way: rows.get(f"latency/bert-base/fp16/1x40/replay-{way}")
        for way in ("fold", "fold-no-pdl", "store", "store-no-pdl")
    }
    if all(ways.values()):
        us = {way: f"{row['replay_us']:.0f}" for way, row in ways.items() if row}
        table += [
            "",
            f"At 40 tokens without dependent launches: {us['fold-no-pdl']} folded and "
            f"{us['store-no-pdl']} stored, with them {us['fold']} and {us['store']}.",
        ]
    return "\n".join(table)


def shape_rows(folder: Path) -> str:
    """Models at several shapes, eager beside each."""
    _, rows = read(folder)
    table = [
        "| model | batch x length | turbotx, one call | in a row | eager, one call | in a row |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for place in _places(rows, r"shapes/(\S+/fp16/\d+x\d+)"):
        name, _, shape = place.split("/")
        row = rows[f"shapes/{place}"]
        table.append(
            f"| {name} | {shape.replace('x', ' x ')} | {row['latency_us']:,.0f} | "
            f"{row['row_us']:,.0f} | {row['eager_us']:,.0f} | {row['eager_row_us']:,.0f} |"
        )
    return "\n".join(table)


def function_rows(folder: Path) -> str:
    """Softmax and LayerNorm as shares of a plain copy's bandwidth."""
    _, rows = read(folder)
    copy = rows.get("device/ceilings", {}).get("copy_gb_per_s", 0.0)
    table = [
        f"512 MiB of float16; a copy of 1 GiB moves {copy:,.0f} GB/s.", "",
        "| function | width | turbotx | of the copy | PyTorch | Inductor |",
        "|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for place in _places(rows, r"((?:softmax|layer_norm)/\d+/fp16/large)/turbotx"):
        function, width, *_ = place.split("/")
        found = [
            rows[f"{place}/{engine}"]["gb_per_s"] for engine in ("turbotx", "torch", "inductor")
        ]
        share = f"{found[0] / copy:.0%}" if copy else ""
        table.append(
            f"| {function} | {width} | {found[0]:,.0f} GB/s | {share} | {found[1]:,.0f} | "
            f"{found[2]:,.0f} |"
        )
    return "\n".join(table)


def decode_rows(folder: Path) -> str:
    """A step of decoders with a key/value cache, beside others and the time to read all once."""
    _, rows = read(folder)
    table = [
        "float16, us a step in a row of steps; floor: the bytes of float16 weights and of the cache"
        " at a copy's bandwidth; torch.compile: reduce-overhead, over a static cache.", "",
        "| model | weights | batch | past | turbotx | replay alone | floor | eager |"
        " torch.compile | eager over turbotx |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for place in _places(rows, r"(decode/\w+/fp16[\w-]*/b\d+/past\d+)/turbotx"):
        own = rows[f"{place}/turbotx"]
        _, model, dtype, batch, past = place.split("/")
        others = [rows.get(f"{place}/{e}", {}).get("row_us") for e in ("eager", "compile-static")]
        found = [own["row_us"], own["replay_us"], own["floor_us"], *others]
        texts = ["" if us is None else f"{us:,.0f}" for us in found]
        ahead = f"{others[0] / own['row_us']:.1f} x" if others[0] else ""
        weights = dtype.removeprefix("fp16-").removesuffix("-weights").replace("fp16", "float16")
        table.append(
            f"| {model} | {weights} | {batch[1:]} | {past[4:]} | {' | '.join(texts)} | {ahead} |"
        )
    return "\n".join(table)


def int8_rows(folder: Path) -> str:
    """Calls in a row, and bare replays, of the float program and of those in int8 and fp8."""
    _, rows = read(folder)
    table = [
        "Rows in float16, us a call of calls in a row; then bare replays.", "",
        "| model | batch x length | float16 | int8 | fp8 | replay: float16 | int8 | fp8 |"
        " float16 / int8, in a row |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for place in _places(rows, r"(int8/[\w-]+/fp16/\d+x\d+)/float"):
        _, model, _, shape = place.split("/")
        measured = [rows[f"{place}/{way}"] for way in ("float", "int8", "fp8")]
        found = [row[kind] for kind in ("row_us", "replay_us") for row in measured]
        texts = " | ".join(f"{us:,.0f}" for us in found)
        gain = f"{found[0] / found[1]:.2f}"
        table.append(f"| {model} | {shape.replace('x', ' x ')} | {texts} | {gain} |")
    return "\n".join(table)


def serving_rows(folder: Path) -> str:
    """What the server answered: texts with vectors, prompts with tokens."""
    _, rows = read(folder)
    texts = rows.get("serve/bert-base/fp16")
    tokens = rows.get("serve/gpt2/fp16")
    if texts is None or tokens is None:
        return NOT_YET
    table = [
        "| model | clients | texts a request | a second | first token, ms (median, p99) |"
        " between tokens, ms (median, p99) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for clients, each in ((1, 1), (32, 1), (4, 32)):
        rate = texts[f"clients{clients}x{each}_texts_per_s"]
        table.append(f"| bert-base | {clients} | {each} | {rate:,.0f} texts |  |  |")
    for row in tokens["rows"]:
        waits = [", ".join(f"{ms:.1f}" for ms in row[k]) for k in ("first_ms", "between_ms")]
        table.append(
            f"| gpt2 | {row['clients']} | 1 | {row['tokens_per_s']:,.0f} tokens | "
            f"{' | '.join(waits)} |"
        )
    return "\n".join(table)


PACKED = {
    "packed": "packed, lengths on the host",
    "packed-device-lengths": "packed, lengths on the device",
    "packed-by-mask": "packed, by the mask",
    "padded": "padded",
    "equal-lengths": "as many tokens in texts of one length",
    "eager": "eager, padded",
    "eager-graphs": "eager in a CUDA graph, padded",
    "compile": "torch.compile, padded",
    "compile-reduce-overhead": "torch.compile, reduce-overhead, padded",
}


def packed_rows(folder: Path) -> str:
    """A batch of mixed lengths, packed and padded, by every engine that ran."""
    _, rows = read(folder)
    table = [
        "float16, us; U(5, 500): lengths drawn evenly.", "",
        "| model | batch | engine | one call | calls in a row | us a token |",
        "|---|---|---|---:|---:|---:|",
    ]  # fmt: skip
    for place in _places(rows, r"(packed/[\w-]+/fp16/[^/]+)/packed"):
        _, model, _, batch = place.split("/")
        for engine, words in PACKED.items():
            row = rows.get(f"{place}/{engine}")
            if row is not None:
                table.append(
                    f"| {model} | {batch.replace('x', ' x ')} | {words} | "
                    f"{row['latency_us']:,.0f} | {row['row_us']:,.0f} | {row['us_a_token']:.3f} |"
                )
    for place in _places(rows, r"(packed-stream/[\w-]+/fp16)"):
        row = rows[place]
        table += ["", f"{place.split('/')[1]}: {row['mixtures']} mixtures of random lengths replay "
                  f"{row['graphs']} graphs, of {row['captures']} capture."]  # fmt: skip
    return "\n".join(table)


def right_rows(folder: Path) -> str:
    """What was compared with float64 on the device."""
    _, rows = read(folder)
    models = {n: r for n, r in rows.items() if n.startswith("right/")}
    known = {n: r for n, r in rows.items() if n.startswith("architecture/")}
    lines = []
    for what, found in (
        ("models, plainly, captured and replayed", models),
        ("architectures in float16 and bfloat16, cut to two layers", known),
    ):
        if not found:
            continue
        good = [n for n, r in found.items() if r["holds"]]
        rest = [n for n in found if n not in good]
        worst = max((found[n]["worst"] for n in good), default=0.0)
        bad = f"; not: {', '.join(rest)}" if rest else ""
        lines.append(
            f"- {len(good)} of {len(found)} {what}: the largest error is {worst:.2f} of what is "
            f"allowed{bad}."
        )
    return "\n".join(lines)


def claims(folder: Path) -> Iterator[tuple[str, str]]:
    """The rows of docs/results.md."""
    device, rows = read(folder)
    device = device.partition(";")[0]
    what = "Latency of BERT-base in float16 on a GPU"
    parts = []
    for shape in ("1x40", "32x128"):
        place = f"latency/bert-base/fp16/{shape}"
        replay = rows.get(f"{place}/replay-default")
        if replay and f"{place}/turbotx" in rows:
            own = rows[f"{place}/turbotx"]["row_us"]
            others = (
                f"{rows[f'{place}/{e}']['row_us'] / own:.2f} x faster than {words}"
                for e, words in ENGINES.items()
                if e in ("eager-graphs", "compile-reduce-overhead") and f"{place}/{e}" in rows
            )
            parts.append(
                f"({shape.replace('x', ', ')}) {replay['replay_us']:,.0f} us on the device; calls "
                f"in a row: {', '.join(others)}"
            )
    yield what, f"{'. '.join(parts)} ({device})" if parts else NOT_YET
    stream = rows.get("stream/bert-base/fp16")
    what = "1,000 requests of random lengths on a GPU, BERT-base in float16"
    if stream:
        grown = stream["grown"]
        yield (
            what,
            f"{grown['kernel_builds']} kernels built, {grown['captures']} captures of the model, "
            f"{grown['chunk_allocations']} allocations of memory after the first ({device})",
        )
    else:
        yield what, NOT_YET
    copy = rows.get("device/ceilings", {}).get("copy_gb_per_s", 0.0)
    shares = [
        rows[name]["gb_per_s"] / copy
        for name in rows
        if re.fullmatch(r"(softmax|layer_norm)/\d+/fp16/large/turbotx", name) and copy
    ]
    what = "Softmax and LayerNorm of 512 MiB on a GPU, of a copy's bandwidth"
    yield what, f"{min(shares):.0%} to {max(shares):.0%} ({device})" if shares else NOT_YET


def _places(rows: Rows, pattern: str) -> list[str]:
    """Return what the pattern's group finds in the names of rows, each once."""
    found = (re.fullmatch(pattern, name) for name in rows)
    return list(dict.fromkeys(m[1] for m in found if m))


GPU_TABLES: dict[str, Callable[[Path], str]] = {
    "gpu_latency": latency_rows,
    "gpu_programs": program_rows,
    "gpu_shapes": shape_rows,
    "gpu_functions": function_rows,
    "gpu_right": right_rows,
    "gpu_decode": decode_rows,
    "gpu_int8": int8_rows,
    "gpu_serving": serving_rows,
    "gpu_packed": packed_rows,
}
