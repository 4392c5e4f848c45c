"""Launch lists for the memory benchmark: what a compiled model runs, and how large its buffers are.

In: a model's name, or a JSON file that the compiler exported. Out: a LaunchList, whose sizes are
formulas in batch and seq, evaluated for whole grids of shapes at once::

    {"name": "gelu_0", "reads": ["ffn_0"], "writes": ["act_0"], "inplace": [["act_0", "ffn_0"]]}
    buffers: {"ffn_0": "4*batch*seq*3072", ...}
"""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from turbotx.memory.liveness import LaunchUse, analyze
from turbotx.memory.planner import Lifetime


@dataclass
class LaunchList:
    """Launches in order, a formula in bytes for every buffer, and what lies outside the arena."""

    name: str
    launches: list[dict[str, Any]] = field(default_factory=list)
    buffers: dict[str, str] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, path: Path) -> LaunchList:
        record = json.loads(path.read_text())
        return cls(
            record.get("name", path.stem),
            record["launches"],
            record["buffers"],
            record.get("outside", []),
            record.get("aliases", {}),
        )

    def launch(
        self,
        name: str,
        reads: list[str],
        writes: dict[str, str],
        inplace: list[tuple[str, str]] | None = None,
        workspaces: dict[str, str] | None = None,
    ) -> None:
        """Adds a launch; `writes` and `workspaces` map new buffers to their formulas."""
        self.buffers.update(writes)
        self.buffers.update(workspaces or {})
        self.launches.append(
            {
                "name": name,
                "reads": reads,
                "writes": list(writes),
                "workspaces": list(workspaces or {}),
                "inplace": [list(pair) for pair in inplace or []],
            }
        )


@dataclass
class Sized:
    """A launch list after liveness: ready for planners, with sizes per class for any shape."""

    name: str
    launch_count: int
    names: list[str]
    lifetimes: list[Lifetime]
    size_class: list[int]
    formulas: list[str]

    def class_nbytes(self, batch: Any, seq: Any) -> np.ndarray:
        """Bytes per class, shape (classes,) for one shape or (classes, ...) for a grid."""
        batch, seq = np.asarray(batch, dtype=np.int64), np.asarray(seq, dtype=np.int64)
        return np.stack([evaluate(formula, batch, seq) for formula in self.formulas])

    def samples(self) -> list[list[int]]:
        """Sizes at shapes spread over batch 1..20 and length 1..512, for a planner to aim at."""
        batch, seq = np.meshgrid([1, 2, 4, 8, 20], [1, 4, 16, 32, 64, 96, 128, 192, 256, 384, 512])
        rows: list[list[int]] = self.class_nbytes(batch.ravel(), seq.ravel()).T.tolist()
        return rows


def evaluate(formula: str, batch: np.ndarray, seq: np.ndarray) -> np.ndarray:
    """A formula of dims, integers, + - * // and max, over arrays of shapes."""
    tree = ast.parse(formula, mode="eval")
    allowed = (
        ast.Expression, ast.BinOp, ast.UnaryOp, ast.Constant, ast.Name, ast.Load, ast.Call,
        ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.USub,
    )  # fmt: skip
    for node in ast.walk(tree):
        if not isinstance(node, allowed):
            raise ValueError(f"{formula!r} is no size formula: {type(node).__name__}")
    free = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    # A capture names each input's dims: attention_mask_d0 is that input's batch.
    names = {name: batch if name.endswith("_d0") else seq for name in free}
    names |= {"batch": batch, "seq": seq, "max": np.maximum, "__builtins__": {}}
    value = eval(compile(tree, "<size>", "eval"), names)
    return np.broadcast_to(np.asarray(value, dtype=np.int64), np.broadcast(batch, seq).shape)


def size(model: LaunchList) -> Sized:
    """Runs liveness and numbers the size classes."""
    uses = [
        LaunchUse(
            record["name"],
            tuple(record["reads"]),
            tuple(record["writes"]),
            tuple(record.get("workspaces", ())),
            tuple((written, read) for written, read in record.get("inplace", ())),
        )
        for record in model.launches
    ]
    live = analyze(uses, outside=model.outside, aliases=model.aliases, size_of=model.buffers)
    formulas = list(dict.fromkeys(model.buffers[name] for name in live.names))
    return Sized(
        model.name,
        len(uses),
        list(live.names),
        list(live.lifetimes),
        [formulas.index(model.buffers[name]) for name in live.names],
        formulas,
    )


@dataclass(frozen=True)
class Shape:
    """Dimensions of a transformer; `fused` attention keeps no (seq, seq) scores."""

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    kv_heads: int = 12
    ffn: int = 3072
    vocab: int = 30522
    item_nbytes: int = 4
    fused: bool = True
    reuse: bool = True

    def rows(self, width: int) -> str:
        return f"{self.item_nbytes * width}*batch*seq"

    @property
    def scores(self) -> str:
        return f"{self.item_nbytes * self.heads}*batch*seq*seq"

    def pairs(self, written: str, read: str) -> list[tuple[str, str]]:
        return [(written, read)] if self.reuse else []


def attention(model: LaunchList, s: Shape, i: int, qkv: str, bias: list[str]) -> str:
    """Adds one attention, whole or as two GEMMs around a softmax; the name of its context."""
    context = {f"ctx_{i}": s.rows(s.hidden)}
    if s.fused:
        model.launch(f"attention_{i}", [qkv, "key_length", *bias], context)
        return f"ctx_{i}"
    model.launch(f"scores_{i}", [qkv], {f"qk_{i}": s.scores})
    model.launch(
        f"softmax_{i}",
        [f"qk_{i}", "key_length", *bias],
        {f"prob_{i}": s.scores},
        s.pairs(f"prob_{i}", f"qk_{i}"),
    )
    model.launch(f"context_{i}", [f"prob_{i}", qkv], context)
    return f"ctx_{i}"


def bert(name: str, s: Shape) -> LaunchList:
    """Post-norm encoder: packed QKV, attention, two LayerNorm kernels and GELU a layer."""
    model = LaunchList(name, outside=["ids", "key_length", "hidden_out", "pooled_out"])
    model.launch("embed_layer_norm", ["ids"], {"x_0": s.rows(s.hidden)})
    for i in range(s.layers):
        x, out = f"x_{i}", f"x_{i + 1}"
        model.launch(f"qkv_{i}", [x], {f"qkv_{i}": s.rows(3 * s.hidden)})
        ctx = attention(model, s, i, f"qkv_{i}", [])
        model.launch(f"out_{i}", [ctx], {f"o_{i}": s.rows(s.hidden)})
        model.launch(
            f"add_norm_1_{i}",
            [f"o_{i}", x],
            {f"h_{i}": s.rows(s.hidden)},
            s.pairs(f"h_{i}", f"o_{i}"),
        )
        model.launch(f"ffn_in_{i}", [f"h_{i}"], {f"f_{i}": s.rows(s.ffn)})
        model.launch(
            f"gelu_{i}", [f"f_{i}"], {f"g_{i}": s.rows(s.ffn)}, s.pairs(f"g_{i}", f"f_{i}")
        )
        model.launch(f"ffn_out_{i}", [f"g_{i}"], {f"y_{i}": s.rows(s.hidden)})
        target = "hidden_out" if i == s.layers - 1 else out
        model.launch(
            f"add_norm_2_{i}",
            [f"y_{i}", f"h_{i}"],
            {target: s.rows(s.hidden)},
            s.pairs(target, f"y_{i}"),
        )
    model.launch("pool", ["hidden_out"], {"pool": f"{s.item_nbytes * s.hidden}*batch"})
    model.launch("pool_tanh", ["pool"], {"pooled_out": f"{s.item_nbytes * s.hidden}*batch"})
    return model


def gpt2(name: str, s: Shape) -> LaunchList:
    """Pre-norm decoder; the residual stream lives beside each branch; logits are the output."""
    model = LaunchList(name, outside=["ids", "key_length", "logits_out"])
    wide = s.rows(s.hidden)
    model.launch("embed_norm", ["ids"], {"r_0": wide, "n_0": wide})
    for i in range(s.layers):
        model.launch(f"qkv_{i}", [f"n_{i}"], {f"qkv_{i}": s.rows(3 * s.hidden)})
        ctx = attention(model, s, i, f"qkv_{i}", [])
        model.launch(f"out_{i}", [ctx], {f"o_{i}": wide})
        model.launch(
            f"add_norm_1_{i}", [f"o_{i}", f"r_{i}"], {f"m_{i}": wide, f"p_{i}": wide},
            s.pairs(f"m_{i}", f"r_{i}") + s.pairs(f"p_{i}", f"o_{i}"),
        )  # fmt: skip
        model.launch(f"ffn_in_{i}", [f"p_{i}"], {f"f_{i}": s.rows(s.ffn)})
        model.launch(
            f"gelu_{i}", [f"f_{i}"], {f"g_{i}": s.rows(s.ffn)}, s.pairs(f"g_{i}", f"f_{i}")
        )
        model.launch(f"ffn_out_{i}", [f"g_{i}"], {f"y_{i}": wide})
        model.launch(
            f"add_norm_2_{i}", [f"y_{i}", f"m_{i}"], {f"r_{i + 1}": wide, f"n_{i + 1}": wide},
            s.pairs(f"r_{i + 1}", f"m_{i}") + s.pairs(f"n_{i + 1}", f"y_{i}"),
        )  # fmt: skip
    model.launch("logits", [f"n_{s.layers}"], {"logits_out": s.rows(s.vocab)})
    return model


def llama(name: str, s: Shape) -> LaunchList:
    """RMSNorm, grouped-query attention with rotary tables, SwiGLU with packed gate and up."""
    model = LaunchList(name, outside=["ids", "key_length", "logits_out"])
    wide, head = s.rows(s.hidden), s.hidden // s.heads
    table = f"{s.item_nbytes * head}*seq"
    model.launch("rotary", [], {"cos": table, "sin": table})
    model.launch("embed_norm", ["ids"], {"r_0": wide, "n_0": wide})
    packed = s.hidden + 2 * s.kv_heads * head
    for i in range(s.layers):
        model.launch(f"qkv_{i}", [f"n_{i}"], {f"qkv_{i}": s.rows(packed)})
        model.launch(
            f"rope_{i}", [f"qkv_{i}", "cos", "sin"],
            {f"q_{i}": wide, f"k_{i}": s.rows(s.kv_heads * head)},
        )  # fmt: skip
        model.launch(
            f"attention_{i}", [f"q_{i}", f"k_{i}", f"qkv_{i}", "key_length"], {f"ctx_{i}": wide},
            s.pairs(f"ctx_{i}", f"q_{i}"),
            None if s.fused else {f"s_{i}": s.scores},
        )  # fmt: skip
        model.launch(f"out_{i}", [f"ctx_{i}"], {f"o_{i}": wide})
        model.launch(
            f"add_norm_1_{i}", [f"o_{i}", f"r_{i}"], {f"m_{i}": wide, f"p_{i}": wide},
            s.pairs(f"m_{i}", f"r_{i}") + s.pairs(f"p_{i}", f"o_{i}"),
        )  # fmt: skip
        model.launch(f"gate_up_{i}", [f"p_{i}"], {f"f_{i}": s.rows(2 * s.ffn)})
        model.launch(f"swiglu_{i}", [f"f_{i}"], {f"g_{i}": s.rows(s.ffn)})
        model.launch(f"down_{i}", [f"g_{i}"], {f"y_{i}": wide})
        model.launch(
            f"add_norm_2_{i}", [f"y_{i}", f"m_{i}"], {f"r_{i + 1}": wide, f"n_{i + 1}": wide},
            s.pairs(f"r_{i + 1}", f"m_{i}") + s.pairs(f"n_{i + 1}", f"y_{i}"),
        )  # fmt: skip
    model.launch("logits", [f"n_{s.layers}"], {"logits_out": s.rows(s.vocab)})
    return model


def t5(name: str, s: Shape) -> LaunchList:
    """Pre-norm encoder whose relative position bias (heads, seq, seq) lives through all layers."""
    model = LaunchList(name, outside=["ids", "key_length", "hidden_out"])
    wide = s.rows(s.hidden)
    model.launch("position_bias", [], {"bias": f"{s.item_nbytes * s.heads}*seq*seq"})
    model.launch("embed_norm", ["ids"], {"r_0": wide, "n_0": wide})
    for i in range(s.layers):
        model.launch(f"qkv_{i}", [f"n_{i}"], {f"qkv_{i}": s.rows(3 * s.hidden)})
        ctx = attention(model, s, i, f"qkv_{i}", ["bias"])
        model.launch(f"out_{i}", [ctx], {f"o_{i}": wide})
        model.launch(
            f"add_norm_1_{i}", [f"o_{i}", f"r_{i}"], {f"m_{i}": wide, f"p_{i}": wide},
            s.pairs(f"m_{i}", f"r_{i}") + s.pairs(f"p_{i}", f"o_{i}"),
        )  # fmt: skip
        model.launch(f"ffn_in_{i}", [f"p_{i}"], {f"f_{i}": s.rows(s.ffn)})
        model.launch(
            f"relu_{i}", [f"f_{i}"], {f"g_{i}": s.rows(s.ffn)}, s.pairs(f"g_{i}", f"f_{i}")
        )
        model.launch(f"ffn_out_{i}", [f"g_{i}"], {f"y_{i}": wide})
        last = i == s.layers - 1
        outputs = {"hidden_out": wide} if last else {f"r_{i + 1}": wide, f"n_{i + 1}": wide}
        model.launch(
            f"add_norm_2_{i}", [f"y_{i}", f"m_{i}"], outputs,
            [] if last else s.pairs(f"r_{i + 1}", f"m_{i}") + s.pairs(f"n_{i + 1}", f"y_{i}"),
        )  # fmt: skip
    return model


def compiled_models() -> list[LaunchList]:
    """The four families as turbotx compiled them, exported by memory_export.py."""
    paths = sorted((Path(__file__).parent / "data" / "launches").glob("*.json"))
    return [LaunchList.from_json(path) for path in paths]


def hand_models() -> list[LaunchList]:
    """The four families as turbotx launches them, then harder relatives of each."""
    base = Shape()
    small_llama = Shape(hidden=2048, heads=32, kv_heads=8, ffn=5632, vocab=32000, item_nbytes=2)
    return [
        bert("bert-base", base),
        gpt2("gpt2", Shape(vocab=50257)),
        llama("llama", small_llama),
        t5("t5-encoder", base),
        bert("bert-base, unfused attention", Shape(fused=False)),
        gpt2("gpt2, unfused attention", Shape(vocab=50257, fused=False)),
        llama("llama, attention workspace", Shape(12, 2048, 32, 8, 5632, 32000, 2, False)),
        t5("t5-encoder, unfused attention", Shape(fused=False)),
        bert("bert-base, nothing in place", Shape(fused=False, reuse=False)),
        gpt2("gpt2, nothing in place", Shape(fused=False, reuse=False)),
        llama("llama, nothing in place", Shape(12, 2048, 32, 8, 5632, 32000, 2, False, False)),
        t5("t5-encoder, nothing in place", Shape(fused=False, reuse=False)),
    ]
