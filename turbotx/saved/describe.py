"""Describe: a compiled call as the tables that a saved file holds; every size becomes text.

In: a compiled call. Out: dicts, lists, numbers and strings, which `saved.program` runs from::

    {"dims": ["batch", "seq"], "values": ["batch * seq", ...], "launches": [...], "memory": {...}}
"""

from __future__ import annotations

from typing import Any

import sympy
import torch.utils._pytree as pytree
from torch import fx

from turbotx import ir
from turbotx.capture.eager import Alias
from turbotx.capture.trace import Captured
from turbotx.engine.pipeline import Compiled
from turbotx.errors import SaveError
from turbotx.ir.expr import to_python
from turbotx.kernels.lowering.lower import Lowered
from turbotx.memory.planner.symbolic import SymbolicPlanner
from turbotx.passes.extract import extract
from turbotx.runtime.aten import is_whole
from turbotx.runtime.cpu.launch_table import IN_RUNTIME
from turbotx.runtime.cpu.runtime import CpuRuntime
from turbotx.runtime.program import Program
from turbotx.saved.calls import encode_arguments, encode_nodes, encode_target
from turbotx.saved.values import Leaf, encode_constant, encode_tree


def describe_call(compiled: Compiled) -> dict[str, Any]:
    """Return what is the same of a compiled call on every device, as JSON.

    Raises SaveError for what cannot be saved.
    """
    program, captured = compiled.program, compiled.captured
    if captured.effects:
        left = ", ".join(repr(effect.text) for effect in captured.effects)
        raise SaveError(
            f"{captured.name} cannot be saved: its call leaves something in {left}, which a saved "
            "model does not have. Return it instead"
        )
    table = program.runtime.table
    out = pytree.tree_unflatten(
        [Leaf(k) for k in range(captured.out_spec.num_leaves)], captured.out_spec
    )
    return {
        "name": captured.name,
        "dims": list(captured.dims),
        "inputs": _describe_inputs(captured, program),
        "guards": [[to_python(g.condition), g.text] for g in captured.guards],
        "requirements": [[to_python(e), text] for e, text in program.assembly.requirements],
        "slot_count": len(table.slots),
        "values": [to_python(e) for e in table.values],
        "outputs": [
            {
                "slot": table.slots[t.name], "name": t.name, "dtype": encode_constant(t.dtype),
                "shape": [to_python(e) for e in t.shape],
            }
            for t in program.assembly.tensors.values()
            if t.kind == "output"
        ],
        "leaves": [_describe_leaf(leaf, program) for leaf in program.assembly.outputs],
        "out": encode_tree(out),
        "memory": _describe_memory(program),
        "weights": _describe_weights(program),
    }  # fmt: skip


def describe_for_cpu(compiled: Compiled) -> dict[str, Any]:
    """Return a compiled call of the CPU as JSON; raise SaveError for what cannot be one."""
    program, runtime = compiled.program, compiled.program.runtime
    assert isinstance(runtime, CpuRuntime)
    described = describe_call(compiled)
    described["segments"] = [list(s) for s in runtime.table.segments]
    described["launches"] = [
        _describe_launch(k, x, program, runtime) for k, x in enumerate(program.assembly.launches)
    ]
    described["weights"]["packed"] = [
        {
            "slot": p.slot, "tensor": p.window.tensor,
            "shape": [int(e) for e in p.window.shape],
            "strides": [int(e) for e in p.window.strides], "offset": int(p.window.offset),
            "options": list(p.options),
        }
        for p in runtime.packings
    ]  # fmt: skip
    return described


def _describe_inputs(captured: Captured, program: Program) -> list[dict[str, Any]]:
    tensors, slots = program.assembly.tensors, program.runtime.table.slots
    names = [n for n, t in tensors.items() if t.kind == "input"]
    rows = zip(names, captured.input_names, captured.input_sizes, strict=True)
    return [
        {
            "slot": slots[name],
            "name": label,
            "tensor": name,
            "order": program.assembly.orders.get(name),
            "raw": name in program.assembly.raw,
            "sizes": [_describe_size(size) for size in sizes],
        }
        for name, label, sizes in rows
    ]


def _describe_size(size: sympy.Expr) -> dict[str, Any]:
    """An input's size: its text, and where it has one unknown, how the unknown follows from it."""
    described: dict[str, Any] = {"text": to_python(size)}
    if len(size.free_symbols) == 1:
        (unknown,) = size.free_symbols
        slope = sympy.diff(size, unknown)
        if slope.is_Integer:  # size = slope * unknown + rest
            described["solve"] = [unknown.name, int(slope), int(size.xreplace({unknown: 0}))]
    return described


# --- launches ---


def _describe_launch(
    index: int, launch: ir.Launch, program: Program, runtime: CpuRuntime
) -> dict[str, Any]:
    described: dict[str, Any] = {"name": launch.name, "source": launch.source}
    symbol = runtime.table.symbols.get(index)
    if symbol is None:
        return {**described, "aten": describe_step(launch, program)}
    record = runtime.table.records[index]
    described["symbol"] = symbol
    described["library"] = "runtime" if launch.kind in IN_RUNTIME else "kernels"
    described["slots"] = record.slots[: record.arg_count]
    described["offsets"] = record.offsets[: record.arg_count]
    described["sizes"] = record.sizes[: record.size_count]
    described["checks"] = program.checks_of(launch)
    return described


def describe_step(launch: ir.Launch, program: Program) -> dict[str, Any]:
    """A launch that PyTorch runs: one op, or the calls that a kernel stands for."""
    if launch.kind == "kernel":
        (lowered,) = launch.call
        assert isinstance(lowered, Lowered)
        roles = [p.role for p in lowered.kernel.params]
        rows = list(zip(roles, lowered.operands, launch.args, strict=True))
        inputs, outputs = ([n for role, n, _ in rows if role == kind] for kind in ("in", "out"))
        reads, writes = ([a for role, _, a in rows if role == kind] for kind in ("in", "out"))
        extracted = extract(outputs, inputs, launch.name)
        target: Any = extracted.module
        args: Any = (*reads, *extracted.sizes)
        kwargs: Any = {}
        has_out = False
    else:
        target, args, kwargs, writes, has_out = launch.call  # type: ignore[assignment]

    def special(value: Any) -> Any:
        if isinstance(value, ir.Operand):
            return {"window": describe_window(value, program)}
        return {"size": to_python(value)} if isinstance(value, sympy.Basic) else None

    described = {
        "args": encode_arguments(list(args), special),
        "kwargs": encode_arguments(dict(kwargs), special),
        "writes": [None if w is None else describe_window(w, program) for w in writes],
        "has_out": bool(has_out),
    }
    if isinstance(target, fx.GraphModule):
        return {**described, "graph": _describe_module(target)}
    return {**described, "target": encode_target(target)}


def _describe_module(module: fx.GraphModule) -> dict[str, Any]:
    nodes = module.graph.nodes
    (output,) = (n for n in nodes if n.op == "output")
    inputs = [n for n in nodes if n.op == "placeholder"]
    return {
        "inputs": [n.name for n in inputs],
        "nodes": encode_nodes([*inputs, *output.args[0]]),
        "outputs": [n.name for n in output.args[0]],
    }


def describe_window(operand: ir.Operand, program: Program) -> dict[str, Any]:
    return {
        "tensor": operand.tensor,
        "planned": program.assembly.tensors[operand.tensor].kind == "intermediate",
        "dtype": encode_constant(operand.dtype),
        "shape": [to_python(e) for e in operand.shape],
        "strides": [to_python(e) for e in operand.strides],
        "offset": to_python(operand.offset),
    }


def _size_text(value: Any) -> Any:
    return {"size": to_python(value)} if isinstance(value, sympy.Expr) else None


def _describe_leaf(leaf: Any, program: Program) -> dict[str, Any]:
    if isinstance(leaf, ir.Operand):
        if is_whole(leaf, program.assembly.tensors[leaf.tensor]):
            return {"tensor": leaf.tensor}
        return {"window": describe_window(leaf, program)}
    if isinstance(leaf, Alias):
        steps = [
            {
                "target": encode_target(op),
                "args": encode_arguments(list(args), _size_text),
                "kwargs": encode_arguments(dict(kwargs), _size_text),
            }
            for op, args, kwargs in leaf.steps
        ]
        return {"alias": leaf.root, "steps": steps}
    if isinstance(leaf, sympy.Basic):
        return {"size": to_python(leaf)}
    return {"constant": encode_constant(leaf)}


# --- memory and weights ---


def _describe_memory(program: Program) -> dict[str, Any]:
    tensors, liveness = program.assembly.tensors, program.liveness
    classes = program.size_classes
    texts = {c: to_python(tensors[n].nbytes) for n, c in zip(liveness.names, classes, strict=True)}
    planner = program.planner
    orders = planner.orientations if isinstance(planner, SymbolicPlanner) else ()
    place = {root: k for k, root in enumerate(liveness.names)}
    return {
        "planner": program.planner_kind,
        "names": list(liveness.names),
        "lifetimes": [[x.begin, x.end] for x in liveness.lifetimes],
        "size_class": list(classes),
        "class_nbytes": [texts[c] for c in range(len(texts))],
        "orientations": [{"order": o.order, "below": o.below} for o in orders],
        "planned": [
            [name, place[root], program.runtime.table.slots[name]]
            for name, root in liveness.root_of.items()
        ],
    }


def _describe_weights(program: Program) -> dict[str, Any]:
    slots, weights = program.runtime.table.slots, program.runtime.weights
    return {
        "paths": dict(weights.paths),
        "kinds": {
            name: {
                "dtype": encode_constant(kind.dtype),
                "shape": list(kind.shape),
                "strides": list(kind.strides),
            }
            for name, kind in weights.kinds.items()
        },
        "prepared": encode_nodes(weights.prepared.values()),
        "prepared_names": list(weights.prepared),
        "slots": {
            name: slots[name]
            for name, t in program.assembly.tensors.items()
            if t.kind in ("parameter", "prepared")
        },
    }
