"""Errors against float64, eager's beside turbotx's, over a grid of shapes and architectures.

Out: benchmarks/results/parity.json and a table. A row passes where turbotx's largest error is at
most 1.5 x eager's own plus two units in the last place. One capture serves all shapes of a row::

    python benchmarks/parity.py bert distilbert roberta albert --batches 1 2 7 --lengths 1 17 128
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import turbotx
from turbotx.engine.optimize import engine_of
from turbotx.kernels.processor import processor_name

RESULTS = Path(__file__).parent / "results" / "parity.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ARCHITECTURES = (
    "bert", "distilbert", "roberta", "albert", "electra", "gpt2", "opt", "t5", "llama", "mistral",
    "qwen2", "vit", "bart", "modernbert", "bloom", "mpnet", "gpt_neo", "xlm", "gemma2",
    "deberta-v2", "codegen", "gptj", "flaubert",
)  # fmt: skip
DEPTHS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers")
SMALL = {
    "hidden_size": 64, "dim": 64, "d_model": 64, "n_embd": 64, "embedding_size": 32,
    "num_attention_heads": 4, "n_heads": 4, "n_head": 4, "num_heads": 4, "d_kv": 16,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 128, "hidden_dim": 128, "d_ff": 128, "ffn_dim": 128,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "word_embed_proj_dim": 64, "vocab_size": 1000,
    "image_size": 32, "patch_size": 8, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    "cls_token_id": 0, "sep_token_id": 2, "rotary_dim": 8,
}  # fmt: skip


def make_model(
    architecture: str, layers: int | None, small: bool = False, vocab: int | None = None
) -> nn.Module:
    """A random model of the default configuration, or of 64 channels where `small`, cut to
    `layers` and to `vocab` tokens where they are given."""
    config = transformers.AutoConfig.for_model(architecture)
    if layers is not None:  # given at once, since some configurations make a list of them
        deep: dict[str, Any] = {name: layers for name in DEPTHS if getattr(config, name, None)}
        if architecture == "gpt_neo":
            deep["attention_types"] = [[(["global", "local"] * layers)[:layers], 1]]
        config = transformers.AutoConfig.for_model(architecture, **deep)
    changes: dict[str, Any] = {}
    if vocab is not None:
        changes |= {"vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    for name, value in (changes | SMALL if small else changes).items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    config.use_cache = False
    torch.manual_seed(0)
    if architecture == "t5":
        return transformers.T5EncoderModel(config).eval()
    model = transformers.AutoModel.from_config(config).eval()
    return model.encoder if architecture == "bart" else model


def make_inputs(model: nn.Module, batch: int, seq: int, dtype: torch.dtype) -> dict[str, Any]:
    """Ids with a mask that pads rows to half their length, one token, and not at all; or pixels."""
    if getattr(model.config, "image_size", None):
        side = model.config.image_size
        return {"pixel_values": torch.randn(batch, 3, side, side, dtype=dtype)}
    mask = torch.ones(batch, seq, dtype=torch.long)
    for row in range(1, batch):
        mask[row, max(1, (seq // 2 if row % 2 else 1)) :] = 0
    ids = torch.randint(3, 1000, (batch, seq))
    return {"input_ids": ids, "attention_mask": mask}


def largest_error(output: Any, exact: Any) -> float:
    pairs = zip(_tensors(output), _tensors(exact), strict=True)
    return max(float((a.double() - b).abs().max()) for a, b in pairs if a.numel())


def _tensors(output: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def compare(
    architecture: str, dtype: str, shapes: list[tuple[int, int]], layers: int | None,
    vocab: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run one model over every shape, three ways."""
    model = make_model(architecture, layers, vocab=vocab).to(DTYPES[dtype])
    exact, fast = copy.deepcopy(model).double(), turbotx.optimize(model)
    rows = []
    for batch, seq in shapes:
        inputs = make_inputs(model, batch, seq, DTYPES[dtype])
        wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        with torch.no_grad():
            reference, eager = exact(**wide), model(**inputs)
        ours = fast(**inputs)
        errors = largest_error(eager, reference), largest_error(ours, reference)
        largest = max(float(t.abs().max()) for t in _tensors(reference))
        unit = torch.finfo(DTYPES[dtype]).eps * largest
        passes = errors[1] <= 1.5 * errors[0] + 2 * unit
        row = {"batch": batch, "seq": seq, "eager": errors[0], "turbotx": errors[1]}
        rows.append({**row, "passes": passes})
        print(f"{architecture:12} {dtype:9} {batch:3} x {seq:<4} eager {errors[0]:.2e} "
              f"turbotx {errors[1]:.2e} {'' if passes else 'FAILS'}", flush=True)  # fmt: skip
    stats = fast.stats()
    (compiled,) = engine_of(fast).variants()
    launches: dict[str, int] = {}
    for launch in compiled.assembly.launches:
        launches[launch.kind] = launches.get(launch.kind, 0) + 1
    return {
        "architecture": architecture, "dtype": dtype, "layers": layers, "rows": rows,
        "captures": stats["captures"], "kernel_builds": stats["kernel_builds"],
        "launches": launches, "externs": dict(compiled.assembly.externs),
        "split": sorted({r for f in compiled.fused for r in f.reasons}),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    encoders = ["bert", "distilbert", "roberta", "albert"]
    parser.add_argument("architectures", nargs="*", default=encoders)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 7])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1, 2, 17, 128, 512])
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    shapes = [(b, s) for b in options.batches for s in options.lengths]
    known = json.loads(options.out.read_text())["models"] if options.out.exists() else []
    models = {(m["architecture"], m["dtype"], m["layers"]): m for m in known}
    for architecture in options.architectures:
        for dtype in options.dtypes:
            found = compare(architecture, dtype, shapes, options.layers)
            models[architecture, dtype, options.layers] = found
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            record = {
                "device": processor_name(),
                "versions": versions,
                "models": list(models.values()),
            }
            options.out.parent.mkdir(exist_ok=True)
            options.out.write_text(json.dumps(record, indent=1) + "\n")
            gc.collect()
    return int(any(not row["passes"] for m in models.values() for row in m["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
