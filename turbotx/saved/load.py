"""Load: a saved file becomes a module that answers the calls it was saved with, at any sizes.

In: a file of `turbotx.save`. Out: a `SavedModule`; nothing is traced, solved or compiled, unless
the file's machine code is for another processor and is built again::

    fast = turbotx.load("model.ttx")
    fast(input_ids=ids, attention_mask=mask)
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from turbotx.capture.ambient import differences, read_ambient, read_asked, read_decisive
from turbotx.capture.arguments import carry, describe_leaf, flatten_call, is_float
from turbotx.capture.decisions import Outcomes, describe_last
from turbotx.capture.shape_matcher import ShapeMatcher
from turbotx.capture.traced_float import describe_floats
from turbotx.errors import InputError, SavedFileError, TrainingError
from turbotx.memory.pool import ChunkPool
from turbotx.program.executable import Executable
from turbotx.runtime.binding import Binding
from turbotx.runtime.cpu.executor import CpuExecutor
from turbotx.runtime.cuda.cuda_graphs import CudaGraphProgram, GraphCache
from turbotx.runtime.device import Device
from turbotx.runtime.lru import LruDict
from turbotx.runtime.program import Program
from turbotx.runtime.weights import Weights
from turbotx.saved.codec import Decoder, decode_nodes, decode_program
from turbotx.saved.container import read_container
from turbotx.saved.families import SavedFamily
from turbotx.saved.gpu_kernels import SavedQueue, read_variants
from turbotx.saved.native import Libraries
from turbotx.saved.places import CPU, open_place
from turbotx.saved.saved_call import SavedCall
from turbotx.saved.values import decode_ambient, decode_constant, decode_tree
from turbotx.saved.weight_files import load_weights

MAX_SHAPES = 256
MOST_RUNS = 8
"""Of one call, each on the way that the one before found a decision to come out."""
Maker = Callable[[Mapping[str, Any], Executable, Weights, ChunkPool], Program]


def load(
    path: str | PathLike[str], *, weights: str | PathLike[str] | nn.Module | None = None,
    device: str | torch.device | None = None,
) -> SavedModule:  # fmt: skip
    """Return the module of a file that `turbotx.save` wrote.

    weights: where to take them from, in place of the file's own: a file for `load_weights`, or a
    module of the same names and shapes, whose tensors are then used as they are. Needed where the
    file was saved without weights. device: where to run, and to put the file's weights, as "cuda";
    by default where a module given as `weights` lies, or else the CPU if the file has a program for
    it, or else the current GPU.

    Raises SavedFileError for a file that is damaged, of another version or for another processor
    or GPU, WeightsError for weights that do not fit.
    """
    manifest, entries = read_container(Path(path))
    state = json.loads(entries["state.json"])
    if weights is None and not manifest["weights"]:
        raise SavedFileError(
            f"{path} was saved without weights: give them, load(path, weights=...)"
        )
    target, gpu = open_place(path, manifest, weights, device)
    place = CPU if gpu is None else gpu.torch_device
    laid = {one["name"]: one["strides"] for one in state} | json.loads(entries["held.json"])
    own = {} if weights is not None else _tensors(path, entries["weights.safetensors"], place)
    held = _tensors(path, entries["held.safetensors"], place)
    own, held = ({n: _lay_out(t, laid[n]) for n, t in x.items()} for x in (own, held))
    if isinstance(weights, nn.Module):
        own = {k: v for k, v in weights.state_dict(keep_vars=True).items() if v is not None}
    model = SavedModule(manifest, state, own, held, place)
    if weights is not None and not isinstance(weights, nn.Module):
        load_weights(model, weights)
    programs = enumerate(json.loads(entries["programs.json"]))
    chosen = [(k, x) for k, x in programs if x.get("target", "cpu") == target]
    make = _cpu_maker(manifest, entries) if gpu is None else _gpu_maker(target, entries, gpu)
    for k, tables in chosen:
        prefix = f"{tables.get('variant', k)}.constants."
        constants = {n.removeprefix(prefix): t for n, t in held.items() if n.startswith(prefix)}
        executable, rules, floats, decisions = decode_program(tables, place)
        weights_of = _read_weights(tables["weights"], model, constants, place)
        program = make(tables, executable, weights_of, model._pool)
        ambient, asked = decode_ambient(tables["ambient"])
        state = (ambient, asked, decisions)
        made = SavedCall(program, ShapeMatcher(rules), floats, *state, tables["out"])
        model._add(made, tables["call"])
    return model


def _cpu_maker(manifest: Mapping[str, Any], entries: Mapping[str, bytes]) -> Maker:
    libraries = Libraries(manifest, entries)

    def make(
        tables: Mapping[str, Any], executable: Executable, weights: Weights, pool: ChunkPool
    ) -> Program:
        opened = {unit: libraries.open(name) for unit, name in tables["libraries"].items()}
        return Program(executable, CpuExecutor(executable, weights, opened), pool, MAX_SHAPES)

    return make


def _gpu_maker(target: str, entries: Mapping[str, bytes], device: Device) -> Maker:
    variants = read_variants(target, entries)
    graphs: dict[int, GraphCache] = {}  # programs of one call share theirs

    def make(
        tables: Mapping[str, Any], executable: Executable, weights: Weights, pool: ChunkPool
    ) -> Program:
        own = graphs.setdefault(tables["variant"], GraphCache(tables["graphs"]))
        families = [SavedFamily.of(t, variants) for t in tables["families"]]
        queue = SavedQueue(executable, families, weights, device)
        return CudaGraphProgram(executable, queue, pool, MAX_SHAPES, own)

    return make


def _read_weights(
    described: Mapping[str, Any], model: nn.Module, constants: Mapping[str, torch.Tensor],
    place: torch.device,
) -> Weights:  # fmt: skip
    """Return what a program derives from its parameters, on the device where they lie."""
    nodes = decode_nodes(described["prepared"], place)
    prepared = {name: nodes[name] for name in described["prepared_names"]}
    kinds = Decoder(place).decode(described["kinds"])
    return Weights(model, constants, described["paths"], prepared, kinds)


def _tensors(path: Any, data: bytes, place: torch.device) -> dict[str, torch.Tensor]:
    if not data:
        return {}
    try:
        from safetensors.torch import load as from_bytes
    except ImportError as error:
        raise SavedFileError(
            f"{path} needs the package safetensors: pip install 'turbotx[weights]'"
        ) from error
    return {name: tensor.to(place) for name, tensor in from_bytes(data).items()}


class SavedModule(nn.Module):
    """The calls of a saved model. Its parameters have the model's own names, and may be changed.

    Outputs are the model's, nested as they were; a class of its own (as of Hugging Face's outputs)
    is used where its package is imported already, and is otherwise an ordered dict with attributes.
    """

    compiled_by_turbotx = True
    """Has `turbotx.optimize` and `turbotx.explain` refuse it by name."""

    def __init__(
        self, manifest: Mapping[str, Any], state: list[Mapping[str, Any]],
        own: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor], place: torch.device,
    ) -> None:  # fmt: skip
        super().__init__()
        self.training = False
        self.saved_by = dict(manifest)
        self._place = place
        self._pool = ChunkPool(place)
        self._lock = threading.Lock()
        self._calls: dict[Any, list[SavedCall]] = {}
        self._bound: LruDict[Any, tuple[SavedCall, Binding]] = LruDict(256)
        self._asked: tuple[int, ...] = ()
        self._asks_floats = False
        tied: dict[str, torch.Tensor] = {}
        for one in state:
            if one["tied_to"] not in tied:
                tied[one["tied_to"]] = _make_tensor(one, own, place)
            self._hold(one["name"], tied[one["tied_to"]], persistent=True)
        for name, tensor in held.items():
            if ".constants." not in name:
                self._hold(name, tensor, persistent=False)

    def _hold(self, path: str, tensor: torch.Tensor, persistent: bool) -> None:
        *parents, leaf = path.split(".")
        module: nn.Module = self
        for part in parents:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if isinstance(tensor, nn.Parameter):
            module._parameters[leaf] = tensor
        else:
            module.register_buffer(leaf, tensor, persistent=persistent)

    def _add(self, made: SavedCall, call: Mapping[str, Any]) -> None:
        """Add a program; call: the kind of call that it serves, as JSON."""
        kinds = [
            (float,)
            if kind == "float"
            else (decode_constant(kind), self._place, rank, *map(tuple, order))
            for kind, rank, *order in call["inputs"]
        ]
        args, kwargs = decode_tree(call["tree"], lambda k: _SavedArgument(kinds[k]))
        leaves, spec = pytree.tree_flatten((args, kwargs))
        self._calls.setdefault((spec, tuple(map(_describe, leaves))), []).append(made)
        self._asked = tuple(sorted({*self._asked, *made.asked}))
        self._asks_floats |= any(x.is_particular for x in made.floats)

    # --- calls ---

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output; raises InputError for a call that the file has no program
        for, and TrainingError in training mode or where an input requires grad."""
        if self.training:
            raise TrainingError("a saved model is for inference only: call .eval()")
        leaves, spec = flatten_call(args, kwargs)
        tensors = carry(leaves)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise TrainingError("an input requires grad: call under torch.no_grad()")
        key = (spec, tuple(map(_describe, leaves)))
        ambient = read_decisive() + read_asked(self._asked)
        numbers = tuple(x.hex() for x in leaves if is_float(x)) if self._asks_floats else ()
        shapes = (key, ambient, numbers, tuple(t.shape for t in tensors))
        outcomes: Outcomes = ()
        for _ in range(MOST_RUNS):
            found = None if outcomes else self._bound.get(shapes)
            if found is None:
                found = self._bind(key, tensors, outcomes)
                with self._lock:
                    self._bound[shapes] = found
            call, binding = found
            leaves, outcomes = call.run(binding, tensors)
            if not outcomes:
                return decode_tree(call.out, leaves.__getitem__)
        raise InputError(f"{describe_last(outcomes)}, after {MOST_RUNS} runs of other ways")

    __call__ = forward

    def _bind(
        self, key: Any, tensors: list[torch.Tensor], outcomes: Outcomes
    ) -> tuple[SavedCall, Binding]:
        shapes, ambient = [t.shape for t in tensors], read_ambient()
        # A program for the usual order of dims reads any other from a dense copy.
        known = self._calls.get(key) or self._calls.get(_in_usual_order(key), [])
        differ = [differences(ambient, p.ambient, p.asked) for p in known]
        holding = [p for p, found in zip(known, differ, strict=True) if not found]
        if known and not holding:
            told = "; or ".join(dict.fromkeys("; ".join(found) for found in differ))
            raise InputError(
                f"no saved program was captured in the state that this call is made in: {told}. "
                "Call the optimized module in this state too before it is saved, or load's module "
                "in the other"
            )
        taking = [p for p in holding if all(x.takes(tensors) for x in p.floats)]
        if holding and not taking:
            told = "; or ".join(dict.fromkeys(describe_floats(p.floats) for p in holding))
            raise InputError(
                f"the model computes in another way for other numbers, and was saved for {told}: "
                "call the optimized module with this one too before it is saved"
            )
        for call in taking:
            dims = call.matcher.match(shapes)
            way = not outcomes or (call.decisions is not None and call.decisions.follow(outcomes))
            if dims is not None and way and call.program.serves(dims):
                return call, call.program.bind(dims)
        if outcomes:
            raise InputError(
                f"{describe_last(outcomes)}, and no saved program goes on from there: call the "
                "optimized module with such values too before it is saved"
            )
        refused = [p.matcher.explain(shapes) for p in taking]
        if refused:
            raise InputError(f"no saved program takes these sizes: {'; '.join(refused)}")
        for tensor in tensors:
            if tensor.device != self._place:
                raise InputError(
                    f"an input is on {tensor.device}, and this file was loaded for {self._place}: "
                    "move the inputs there, or give turbotx.load another device"
                )
        held = "; ".join(dict.fromkeys(_show(k) for k in self._calls))
        raise InputError(
            f"the file holds no call of this kind: {_show(key)}. It holds {held}. Call the "
            "optimized module this way before it is saved"
        )

    def refresh(self) -> None:
        """Derive packed weights and constants again at the next call, as `optimize`'s refresh."""
        for program in self.programs():
            program.runtime.weights.forget()

    def programs(self) -> list[Program]:
        """Return the programs of every call in the file, in its order."""
        return [call.program for calls in self._calls.values() for call in calls]

    def stats(self) -> dict[str, int]:
        """Return counts since the file was loaded: programs, builds, plans, graphs, allocations."""
        programs = self.programs()
        pool = self._pool.stats()
        return {
            "programs": len(programs),
            "kernel_builds": sum(p.runtime.builds for p in programs),
            "plans": sum(p.plans for p in programs),
            "graph_captures": sum(p.graph_captures for p in programs),
            "chunk_allocations": pool.chunk_allocations,
            "peak_nbytes": pool.peak_nbytes,
        }

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        raise InputError(
            "a saved model stays in the dtype and on the device that it was saved for: convert the "
            "model before turbotx.optimize, and save that"
        )

    def __repr__(self) -> str:
        calls = "; ".join(dict.fromkeys(_show(k) for k in self._calls))
        return f"<turbotx.SavedModule of {self.saved_by['model']}: {calls}>"


class _SavedArgument:
    """Stands for a tensor of a dtype, a device, a rank and a memory order, or a number, in a saved
    call."""

    def __init__(self, kind: tuple[Any, ...]) -> None:
        self.kind = kind


def _describe(leaf: Any) -> Any:
    """Return what of an argument decides which program serves the call."""
    return leaf.kind if isinstance(leaf, _SavedArgument) else describe_leaf(leaf)


def _in_usual_order(key: Any) -> Any:
    """Return the key of the same call with its inputs' dims in memory as they are counted."""
    spec, described = key
    return spec, tuple(d[:3] if isinstance(d[0], torch.dtype) else d for d in described)


def _show(key: Any) -> str:
    spec, described = key
    shown = [
        f"{str(d[0]).removeprefix('torch.')}[{', '.join('?' * d[2])}]"
        if len(d) >= 3
        else "float"
        if len(d) == 1
        else repr(d[1])
        for d in described
    ]
    if not isinstance(spec, pytree.TreeSpec):
        return f"({', '.join(shown)}, in objects)"
    args, kwargs = pytree.tree_unflatten(shown, spec)
    return f"({', '.join([*map(str, args), *(f'{k}={v}' for k, v in kwargs.items())])})"


def _make_tensor(
    one: Mapping[str, Any], own: Mapping[str, torch.Tensor], place: torch.device
) -> torch.Tensor:
    """Return a state's tensor: the one given, or memory for one that is still to come."""
    dtype, shape = decode_constant(one["dtype"]), list(one["shape"])
    found = own.get(one["name"])
    if found is None:
        found = _lay_out(torch.empty(shape, dtype=dtype, device=place), one["strides"])
    if found.dtype != dtype or list(found.shape) != shape:
        raise InputError(
            f"{one['name']} is {found.dtype} {list(found.shape)}, the program was saved for "
            f"{dtype} {shape}"
        )
    if one["parameter"] and not isinstance(found, nn.Parameter):
        return nn.Parameter(found, requires_grad=False)
    return found


def _lay_out(tensor: torch.Tensor, strides: list[int]) -> torch.Tensor:
    """Return a tensor as it was laid out in the model: files hold dense rows, programs read by
    strides."""
    if list(tensor.stride()) == strides:
        return tensor
    part = tensor
    for d, stride in enumerate(strides):
        if stride == 0 and tensor.shape[d] > 1:
            part = part.narrow(d, 0, 1)
    return part.new_empty_strided(part.shape, strides).copy_(part).expand(tensor.shape)
