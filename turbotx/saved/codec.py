"""Codec: converts an executable and related data to JSON and back.

In: the dataclasses of plain data in `KNOWN`. Out: dicts, lists, numbers and strings, and the same
values again. Decoding rejects sizes that are not arithmetic and ops that PyTorch does not have::

    encode(Packing(3, parts, True))  ->  {"is": "Packing", "slot": 3, "parts": [...], ...}
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from turbotx.capture.decisions import AssumedCondition, Decisions
from turbotx.capture.shape_matcher import InputSize, SizeGuard, SizeRules
from turbotx.capture.traced_float import FloatInput
from turbotx.errors import SavedFileError, SaveError
from turbotx.ir import cache_ops, packed_ops, quantized_ops
from turbotx.ir.attention_ops import (
    along_diagonals,
    attention,
    attention_scores,
    attention_values,
)
from turbotx.ir.expert_ops import grouped_linear, route
from turbotx.ir.sizes import Sizes
from turbotx.memory.liveness import Liveness
from turbotx.memory.planner.orientation import Orientation
from turbotx.memory.planner.plan import Lifetime
from turbotx.passes.packing import PackedInput, PackedOutput, TokenPacking
from turbotx.program import executable as x
from turbotx.program.folded_weights import (
    fold_scales,
    fold_shift,
    fold_sums,
    fold_weight,
    join_affine,
)
from turbotx.runtime.weights import Kind
from turbotx.saved.values import check_texts, decode_constant, encode_constant

assert cache_ops and packed_ops and quantized_ops  # imported to register ops

# The functions in graphs that are not PyTorch ops.
OWN: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem, "attention": attention, "along_diagonals": along_diagonals,
    "attention_scores": attention_scores, "attention_values": attention_values,
    "grouped_linear": grouped_linear, "route": route,
    "fold_weight": fold_weight, "fold_scales": fold_scales, "fold_sums": fold_sums,
    "fold_shift": fold_shift, "join_affine": join_affine,
    "packed_attention": packed_ops.packed_attention, "sequence_sum": packed_ops.sequence_sum,
    "sequence_max": packed_ops.sequence_max, "sequence_token": packed_ops.sequence_token,
    "sequence_cumsum": packed_ops.sequence_cumsum,
}  # fmt: skip

KNOWN: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        x.Window, x.PytorchCall, x.LibraryGemm, x.NativeLaunch, x.QueuedLaunch, x.CalledLaunch,
        x.InputTensor, x.OutputTensor, x.WholeTensor, x.ReturnedView, x.MemoryTables,
        x.WeightWindow, x.Packing, x.CpuTables, x.ArgumentLayout, x.DeviceCells, x.GpuTables,
        x.TokenRange, x.Executable, Liveness, Lifetime, Orientation, SizeRules, InputSize,
        SizeGuard, FloatInput, AssumedCondition, Decisions, Kind, TokenPacking, PackedInput,
        PackedOutput,
    )
}  # fmt: skip


def encode(value: Any) -> Any:
    """Return plain data as JSON; raise SaveError for anything else."""
    if isinstance(value, Sizes):
        return {"sizes": list(value.texts)}
    if type(value).__name__ in KNOWN:
        names = [f.name for f in dataclasses.fields(value)]
        return {"is": type(value).__name__, **{n: encode(getattr(value, n)) for n in names}}
    if isinstance(value, (list, tuple)):
        return [encode(v) for v in value]
    if isinstance(value, frozenset):
        return {"set": [encode(v) for v in sorted(value)]}
    if isinstance(value, Mapping):
        if not all(isinstance(k, str) for k in value):
            raise SaveError(f"a dict cannot be saved whose keys are not strings: {value!r}")
        return {"map": {k: encode(v) for k, v in value.items()}}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, fx.GraphModule):
        return {"graph": _encode_module(value)}
    return {"op": encode_target(value)} if callable(value) else encode_constant(value)


class Decoder:
    """Decodes JSON to values.

    place: the device of calls, whichever device the file names.
    dims: the names allowed in sizes.
    nodes: the nodes that calls may refer to.
    """

    def __init__(
        self, place: torch.device, dims: Sequence[str] = (),
        nodes: Mapping[str, fx.Node] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self._place, self._dims, self._nodes = place, tuple(dims), nodes

    def decode(self, value: Any) -> Any:
        """Return the value that was encoded, with tuples for lists; raise SavedFileError for sizes
        that are not arithmetic on the dims."""
        if isinstance(value, list):
            return tuple(map(self.decode, value))
        if not isinstance(value, dict):
            return value
        if "is" in value:
            named = {k: self.decode(v) for k, v in value.items() if k != "is"}
            check_texts(named.get("dims", ()), self._dims)
            if value["is"] not in KNOWN:
                raise SavedFileError(f"the file refers to {value['is']}, which no program has")
            return KNOWN[value["is"]](**named)
        ((kind, inner),) = value.items()
        if kind == "sizes":
            check_texts(inner, self._dims)
            return Sizes(tuple(inner))
        if kind == "map":
            return {k: self.decode(v) for k, v in inner.items()}
        if kind == "set":
            return frozenset(map(self.decode, inner))
        if kind == "op":
            return decode_target(inner)
        if kind == "node":
            return self._nodes[inner]
        if kind == "graph":
            return _decode_module(inner, self._place)
        return self._place if kind == "device" else decode_constant(value)


def decode_program(
    described: Mapping[str, Any], place: torch.device
) -> tuple[x.Executable, SizeRules, tuple[FloatInput, ...], Decisions | None]:
    """Return what `describe_call` encoded: a program, the sizes and numbers that it serves, and its
    assumptions on values. Raises SavedFileError for invalid names."""
    dims = described["executable"]["dims"]
    if not all(isinstance(name, str) and name.isidentifier() for name in dims):
        raise SavedFileError(f"the file has dims that are not names: {dims}")
    decode = Decoder(place, dims).decode
    asked, padded = described["decisions"], described.get("packing") is not None
    values = [f"value_{k}" for k in range(0 if asked is None else int(asked["count"]))]
    names = (*(dims[:-1] if padded else dims), *values)  # a padded call has no number of tokens
    decisions = Decoder(place, names).decode(asked)
    if decisions is not None and decisions.names != names:
        raise SavedFileError(f"the file decides by {decisions.names}, which no program gives")
    found = (decode(described[name]) for name in ("executable", "sizes", "floats"))
    return (*found, decisions)


def decode_packing(described: Mapping[str, Any], place: torch.device) -> TokenPacking | None:
    """Return how calls of a program are packed, None if they are not; raise SavedFileError if it
    does not match the program's dims and inputs."""
    packing = Decoder(place).decode(described.get("packing"))
    if packing is None:
        return None
    executable = described["executable"]
    names = [one["name"] for one in executable["inputs"]]
    fits = (
        isinstance(packing, TokenPacking)
        and {packing.batch, packing.seq} < set(executable["dims"])
        and [one.name for one in packing.inputs] == names
    )
    if not fits:
        raise SavedFileError(f"the file packs calls by {described['packing']}, unlike its program")
    assert isinstance(packing, TokenPacking)
    return packing


# --- ops, by name ---


def encode_target(target: Any) -> str:
    """Return an op's name; raise SaveError for a function that is not a registered op."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    for name, known in OWN.items():
        if target is known:
            return name
    raise SaveError(f"{target} cannot be saved: PyTorch has no op of that name")


def decode_target(name: str) -> Callable[..., Any]:
    """Return the op of a name; raise SavedFileError if this version of PyTorch has none."""
    if name in OWN:
        return OWN[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except (AttributeError, RuntimeError) as error:
        raise SavedFileError(f"torch {torch.__version__} has no op {name}") from error
    if not isinstance(found, torch._ops.OpOverload):
        raise SavedFileError(f"{name} is not an op of PyTorch")
    return found


# --- graphs of calls ---


def encode_nodes(nodes: Iterable[fx.Node]) -> list[dict[str, Any]]:
    """Return calls and everything that they depend on, in dependency order. Raises SaveError for an
    argument without a JSON form."""
    done: dict[fx.Node, dict[str, Any]] = {}

    def visit(node: fx.Node) -> None:
        if node in done:
            return
        for source in node.all_input_nodes:
            visit(source)
        entry: dict[str, Any] = {"name": node.name}
        if node.op == "call_function":
            entry["target"] = encode_target(node.target)
            entry["args"], entry["kwargs"] = encode(node.args), encode(node.kwargs)
        elif node.op not in ("get_attr", "placeholder"):
            raise SaveError(f"{node.format_node()} cannot be saved")
        done[node] = entry

    for node in nodes:
        visit(node)
    # Constants of folded norms have copies of the parameters' own calls.
    unique: dict[str, dict[str, Any]] = {}
    for entry in done.values():
        if unique.setdefault(entry["name"], entry) != entry:
            raise SaveError(f"two constants are called {entry['name']}; please report it")
    return list(unique.values())


def decode_nodes(entries: Iterable[Mapping[str, Any]], place: torch.device) -> dict[str, fx.Node]:
    """Return the calls as nodes of one fx graph, by name; their inputs are placeholders.

    place: the device to run on, whichever device they name.
    """
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    decode = Decoder(place, nodes=made).decode
    for entry in entries:
        name = entry["name"]
        if "target" in entry:
            target, args = decode_target(entry["target"]), decode(entry["args"])
            made[name] = graph.call_function(target, args, decode(entry["kwargs"]), name=name)
        else:
            made[name] = graph.placeholder(name)
    return made


def _encode_module(module: fx.GraphModule) -> dict[str, Any]:
    (output,) = module.graph.find_nodes(op="output")
    inputs = module.graph.find_nodes(op="placeholder")
    return {
        "inputs": [n.name for n in inputs],
        "nodes": encode_nodes([*inputs, *output.args[0]]),
        "outputs": [n.name for n in output.args[0]],
    }


def _decode_module(described: Mapping[str, Any], place: torch.device) -> fx.GraphModule:
    nodes = decode_nodes(described["nodes"], place)
    graph = next(iter(nodes.values())).graph
    graph.output(tuple(nodes[name] for name in described["outputs"]))
    order = [nodes[name] for name in described["inputs"]]
    for before, node in pairwise(order):
        before.append(node)
    return fx.GraphModule(nn.Module(), graph)
