"""Exports the launch lists of real models, as turbotx compiles them, for the memory benchmark.

In: nothing (default configurations of four families, random weights, 12 layers). Out: a JSON file a
model under benchmarks/data/launches; kernels are neither built nor run::

    python benchmarks/memory_export.py      # needs the extra `hf`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from turbotx.capture.trace import capture
from turbotx.engine.pipeline import rewrite
from turbotx.ir.expr import to_python
from turbotx.kernels.fusion.fuse import fuse_all
from turbotx.passes.partition import find_hoisted, partition
from turbotx.program.assemble import assemble

FOLDER = Path(__file__).parent / "data" / "launches"


def export(name: str, model: torch.nn.Module) -> dict[str, Any]:
    """Captures and assembles one model, and lists what each launch reads and writes."""
    ids = torch.zeros(2, 16, dtype=torch.int64)
    with torch.no_grad():
        captured = capture(model.eval(), (), {"input_ids": ids, "attention_mask": ids + 1})
    graph = captured.graph_module.graph
    rewrite(graph)
    hoisted = find_hoisted(graph)
    regions = fuse_all(graph, partition(graph, hoisted), hoisted)
    assembly = assemble(graph, regions, hoisted, captured.dims)
    tensors = assembly.tensors
    return {
        "name": f"{name}, as compiled",
        "dims": list(captured.dims),
        "launches": [
            {
                "name": launch.name,
                "reads": list(launch.reads),
                "writes": list(launch.writes),
                "workspaces": list(launch.workspaces),
                "inplace": [list(pair) for pair in launch.inplace],
            }
            for launch in assembly.launches
        ],
        "buffers": {n: to_python(t.nbytes) for n, t in tensors.items() if t.kind == "intermediate"},
        "outside": [n for n, t in tensors.items() if t.kind != "intermediate"],
    }


def models() -> dict[str, Any]:
    """Makers of the four families; small vocabularies, since embeddings need no arena."""
    import transformers as hf

    llama = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "use_cache": False}
    t5 = {"d_model": 768, "d_kv": 64, "num_heads": 12, "d_ff": 3072, "num_layers": 12}
    return {
        "bert-base": lambda: hf.BertModel(hf.BertConfig(vocab_size=1000)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=1000, use_cache=False)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=1000, **llama, **heads)),
        "t5-encoder": lambda: hf.T5EncoderModel(hf.T5Config(vocab_size=1000, **t5)),
    }


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, make in models().items():
        record = export(name, make())
        path = FOLDER / f"{name}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{path.name}: {len(record['launches'])} launches, {len(record['buffers'])} buffers")


if __name__ == "__main__":
    main()
