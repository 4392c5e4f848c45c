"""What large models, many layers, long sequences, a shared machine and new shapes cost, on a CPU.

In: which tables to make, all by default; nothing is downloaded, weights are random. Out: JSON under
benchmarks/results/, each row measured in a process of its own, and the tables as text::

    python benchmarks/scale.py                      # under five minutes on two idle cores
    python benchmarks/scale.py memory --large       # with BERT-large and a Llama of 1 B, 15 minutes
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "scale.json"
TABLES = ("memory", "first_call", "long", "shared", "waits", "shapes")
BUSY = "while True: pass"


# --- models ---


def make_model(name: str, layers: int = 0) -> torch.nn.Module:
    """Return a model with random weights: bert-base, bert-large, llama-1b (bfloat16), and narrow
    ones of many layers, bert, gpt2 and llama."""
    from transformers import (
        BertConfig,
        BertModel,
        GPT2Config,
        GPT2Model,
        LlamaConfig,
        LlamaModel,
    )

    torch.manual_seed(0)
    thin: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    deep, plain = {"num_hidden_layers": layers}, {"use_cache": False}
    if name == "bert-base":
        return BertModel(BertConfig()).eval()
    if name == "bert-large":
        return BertModel(BertConfig(num_hidden_layers=24, **large)).eval()
    if name == "bert":
        return BertModel(BertConfig(**thin, **deep, vocab_size=500)).eval()
    if name == "gpt2":
        wide = {"n_embd": 128, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
        return GPT2Model(GPT2Config(**wide, n_layer=layers, vocab_size=500, **plain)).eval()
    if name == "llama":
        return LlamaModel(LlamaConfig(**thin, **deep, vocab_size=500, **plain)).eval()
    assert name == "llama-1b", name
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4,
        num_hidden_layers=22, vocab_size=32000, **plain,
    )  # fmt: skip
    model = LlamaModel(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def tokens(batch: int, seq: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 500, (batch, seq))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# --- what a process measures of itself ---


def memory_of(pid: int | str = "self") -> dict[str, float]:
    """Return resident, proportional and private memory of a process in MB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    found = {line.split()[0].rstrip(":"): int(line.split()[1]) / 1024 for line in text}
    return {"rss": found["Rss"], "pss": found["Pss"], "anonymous": found["Anonymous"]}


def measure_memory(name: str, how: str, path: str) -> dict[str, Any]:
    """how: eager, default, released (keep_weights=False), save, load or load_panels."""
    import turbotx

    call = tokens(1, 40)
    stages = {"imports": memory_of()["rss"]}
    begin = time.perf_counter()
    if how.startswith("load"):
        fast: Any = turbotx.load(path)
        stages["loaded"] = memory_of()["rss"]
        nbytes = sum(x.numel() * x.element_size() for x in fast.parameters())
    else:
        model = make_model(name)
        nbytes = sum(x.numel() * x.element_size() for x in model.parameters())
        stages["model"] = memory_of()["rss"]
        begin = time.perf_counter()
        options = {"keep_weights": how not in ("released", "save_panels")}
        fast = model if how == "eager" else turbotx.optimize(model, **options)
    with torch.no_grad():
        fast(**call)
        first = time.perf_counter() - begin
        fast(**call)
    stages["first call"] = memory_of()["rss"]
    if how.startswith("save"):
        turbotx.save(fast, path)
        stages["saved"] = memory_of()["rss"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"parameters_mb": nbytes / 2**20, "rss_mb": stages, "peak_mb": peak, "first_s": first}


def measure_first_call(name: str, layers: int) -> dict[str, float]:
    import turbotx
    from turbotx.engine.optimize import engine_of

    turbotx.optimize(torch.nn.Linear(4, 4).eval())(torch.zeros(1, 4))  # the runtime, imports
    engine = engine_of(turbotx.optimize(make_model(name, layers)))
    call = tokens(2, 16)
    begin = time.perf_counter()
    captured = engine.capture((), call)
    middle = time.perf_counter()
    compiled = engine.compile(captured)
    end = time.perf_counter()
    memory = compiled.program.plan(captured.example_dims)
    return {
        "capture_s": middle - begin,
        "compile_s": end - middle,
        "planned_over_bound": memory.peak_nbytes / memory.lower_bound_nbytes,
    }


class Attention(torch.nn.Module):
    """Attention of two heads of 64, of the twelve that a projection makes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(64, 3 * 768)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return softmax(q k^T) v."""
        batch, seq, _ = x.shape
        parts = self.qkv(x).split(768, -1)
        q, k, v = (t.view(batch, seq, 12, 64)[:, :, :2].transpose(1, 2) for t in parts)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).reshape(batch, seq, 128)


def measure_long(dtype: str, lengths: list[int]) -> list[dict[str, float]]:
    import turbotx

    model, rows = Attention().eval().to(getattr(torch, dtype)), []
    fast = turbotx.optimize(model)
    for length in lengths:
        given = [torch.randn(1, length, 64).to(getattr(torch, dtype))]
        times = {}
        with torch.no_grad():
            for engine, run in (("turbotx", fast), ("eager", model)):
                run(*given)
                times[engine] = best_of(
                    lambda run=run, given=given: run(*given), 1 if length > 8192 else 3
                )
        flops = 4 * length * length * 64 * 2 + 2 * length * 64 * 3 * 768  # of attention, products
        rows.append(
            {
                "length": length,
                "us_a_token": 1e6 * times["turbotx"] / length,
                "eager_us_a_token": 1e6 * times["eager"] / length,
                "gflops": flops / times["turbotx"] / 1e9,
                "of_eager": times["turbotx"] / times["eager"],
            }
        )
    return rows


def best_of(run: Callable[[], object], count: int) -> float:
    found = []
    for _ in range(count):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return min(found)


def measure_shared(threads: int, engine: str) -> dict[str, float]:
    """Return wall and processor milliseconds of a call of a MiniLM-like model at (1, 10)."""
    from transformers import BertConfig, BertModel

    import turbotx

    torch.set_num_threads(threads)
    config = BertConfig(
        hidden_size=384, intermediate_size=1536, num_attention_heads=12, num_hidden_layers=6
    )
    model = BertModel(config).eval()
    run: Any = turbotx.optimize(model) if engine == "turbotx" else model
    call, count = tokens(1, 10), 100
    with torch.no_grad():
        for _ in range(5):
            run(**call)
        begin, used = time.perf_counter(), time.process_time()
        for _ in range(count):
            run(**call)
        wall, cpu = time.perf_counter() - begin, time.process_time() - used
    return {"wall_ms": 1e3 * wall / count, "cpu_ms": 1e3 * cpu / count}


def measure_waits(engine: str) -> dict[str, float]:
    """Return wall and processor milliseconds of a token that `generate` makes with GPT-2-small's
    shape: its loop runs ops of PyTorch between two steps."""
    from transformers import GPT2Config, GPT2LMHeadModel

    import turbotx

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    run: Any = turbotx.optimize(model) if engine == "turbotx" else model
    call, count = tokens(1, 32), 48
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    found = []
    for _ in range(4):
        begin, used = time.perf_counter(), time.process_time()
        run.generate(**call, **options, pad_token_id=0)
        found.append((time.perf_counter() - begin, time.process_time() - used))
    wall, cpu = min(found)
    return {"token_ms": 1e3 * wall / count, "cpu_ms": 1e3 * cpu / count}


def measure_shapes() -> dict[str, float]:
    """Return the microseconds of a call's own work beside its kernels: of a known and a new shape,
    for a model whose kernels take little; `native_us` of `call_known_us` are theirs."""
    from dispatch import native_times

    import turbotx
    from turbotx.engine.optimize import engine_of

    fast = turbotx.optimize(make_model("bert", 6), max_shapes=64)
    calls = [tokens(1, 2 + k) for k in range(200)]
    engine = engine_of(fast)
    with torch.no_grad(), native_times() as native:
        fast(**calls[0])
        known = min(best_of(lambda: engine.check((), calls[0]), 1) for _ in range(2000))
        whole = min(best_of(lambda: fast(**calls[0]), 1) for _ in range(2000))
        new = sorted(best_of(lambda c=c: engine.check((), c), 1) for c in calls[1:])
    return {
        "check_known_us": 1e6 * known,
        "call_known_us": 1e6 * whole,
        "native_us": min(native),
        "check_new_us": 1e6 * new[len(new) // 2],
    }


# --- processes ---


def child(*call: Any, **variables: str) -> Any:
    """Return what one of the functions above returns, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(call)],
        env={**os.environ, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def make_memory(is_large: bool) -> Iterator[dict[str, Any]]:
    for name in ("bert-base", *(("bert-large", "llama-1b") if is_large else ())):
        with tempfile.TemporaryDirectory() as folder:
            plain, packed = f"{folder}/plain.ttx", f"{folder}/packed.ttx"
            for how, path in (
                ("eager", ""), ("default", ""), ("released", ""), ("save", plain),
                ("save_panels", packed), ("load", plain), ("load_panels", packed),
            ):  # fmt: skip
                yield {"model": name, "how": how, **child("measure_memory", name, how, path)}
            if name == "bert-base":
                for how, path in (("load", plain), ("load_panels", packed)):
                    yield {"model": name, "how": f"4 x {how}", "pss_mb": together(name, how, path)}


def together(name: str, how: str, path: str, count: int = 4) -> float:
    """Return what processes that serve one file take together."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import scale\n"
        f"import turbotx; fast = turbotx.load({path!r})\n"
        "fast(**scale.tokens(1, 40)); print('ready', flush=True); sys.stdin.read()"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(count)
    ]
    for process in started:
        assert process.stdout is not None
        process.stdout.readline()
    found = sum(memory_of(process.pid)["pss"] for process in started)
    for process in started:
        process.communicate("")
    return found


def make_first_call(is_large: bool) -> Iterator[dict[str, Any]]:
    for name in ("bert", "gpt2", "llama"):
        for layers in (6, 12, 24, 48) if is_large else (6, 24):
            with tempfile.TemporaryDirectory() as folder:
                for cache in ("cold", "warm"):
                    row = child("measure_first_call", name, layers, TURBOTX_CACHE_DIR=folder)
                    yield {"model": name, "layers": layers, "cache": cache, **row}


def make_long(is_large: bool) -> Iterator[dict[str, Any]]:
    lengths = [1024, 4096, 16384, 32768, *([65536] if is_large else [])]
    for dtype in ("float32", "bfloat16"):
        for row in child("measure_long", dtype, lengths):
            yield {"dtype": dtype, **row}


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep so many cores busy with other processes."""
    started = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def make_shared(is_large: bool) -> Iterator[dict[str, Any]]:
    for others in (0, 2):
        with busy(others):
            for engine in ("turbotx", "eager"):
                for threads in (1, 2):
                    row = child("measure_shared", threads, engine)
                    yield {"busy": others, "engine": engine, "threads": threads, **row}


def make_waits(is_large: bool) -> Iterator[dict[str, Any]]:
    """300,000 turns are libgomp's own default: said, it is left as it is."""
    for said in ({}, {"GOMP_SPINCOUNT": "300000"}, {"OMP_WAIT_POLICY": "passive"}):
        for engine in ("turbotx", "eager"):
            yield {"said": said, "engine": engine, **child("measure_waits", engine, **said)}


def make_shapes(is_large: bool) -> Iterator[dict[str, Any]]:
    yield child("measure_shapes")


# --- tables ---


def show(row: dict[str, Any]) -> str:
    """Return a row as a line of text."""
    parts = []
    for key, value in row.items():
        if isinstance(value, dict):
            parts.append(f"{key}: {show(value)}")
        else:
            parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(parts)


def main() -> None:
    from turbotx.cli.bench.runner import describe_machine

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", help=f"which of {', '.join(TABLES)}; all by default")
    parser.add_argument("--large", action="store_true", help="large models, more layers and tokens")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    for table in options.tables or TABLES:
        print(f"# {table}", flush=True)
        rows = []
        for row in globals()[f"make_{table}"](options.large):
            rows.append(row)
            print(show(row), flush=True)
        found[table] = {
            "machine": describe_machine(torch.get_num_threads()),
            "torch": torch.__version__,
            "rows": rows,
        }
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        function, *arguments = json.loads(sys.argv[2])
        print(json.dumps(globals()[function](*arguments)))
    else:
        main()
