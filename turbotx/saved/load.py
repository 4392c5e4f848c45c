"""Load: makes a module from a saved file that serves the saved calls at any sizes.

In: a file of `turbotx.save`. Out: a `SavedModule`. Nothing is traced, solved or compiled, unless
the file's machine code is for another processor and must be rebuilt::

    fast = turbotx.load("model.ttx")
    fast(input_ids=ids, attention_mask=mask)
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from turbotx.capture.cache_argument import split_cache
from turbotx.capture.returned_arguments import ReturnedContainer
from turbotx.capture.shape_matcher import ShapeMatcher
from turbotx.errors import InputError, SavedFileError, TrainingError
from turbotx.memory.pool import ChunkPool
from turbotx.program.executable import Executable
from turbotx.runtime.cpu.abi import products_of
from turbotx.runtime.cpu.executor import CpuExecutor
from turbotx.runtime.cuda.cuda_graphs import GraphCache
from turbotx.runtime.device import Device
from turbotx.runtime.make_program import make_program
from turbotx.runtime.packed_program import PackedProgram
from turbotx.runtime.program import Program
from turbotx.runtime.token_inputs import read_sequences
from turbotx.runtime.weights import Weights
from turbotx.saved.call_table import CallTable, SavedCall
from turbotx.saved.codec import Decoder, decode_nodes, decode_packing, decode_program
from turbotx.saved.container import read_container
from turbotx.saved.families import SavedFamily
from turbotx.saved.gpu_kernels import SavedQueue, read_variants
from turbotx.saved.native import Libraries
from turbotx.saved.panels import open_panels
from turbotx.saved.places import CPU, open_place
from turbotx.saved.tensor_file import read_tensors
from turbotx.saved.values import decode_ambient, decode_constant
from turbotx.saved.weight_files import load_weights

MAX_SHAPES = 256
Opener = Callable[
    [Mapping[str, Any], Executable, Weights], tuple[CpuExecutor | SavedQueue, GraphCache | None]
]
"""Returns what runs a program's launches, and on a GPU the CUDA graphs of its call."""


def load(
    path: str | PathLike[str], *, weights: str | PathLike[str] | nn.Module | None = None,
    device: str | torch.device | None = None,
) -> SavedModule:  # fmt: skip
    """Return the module of a file written by `turbotx.save`.

    weights: the source of weights instead of the file: a file for `load_weights`, or a module with
    the same names and shapes, whose tensors are then shared. Required if the file was saved without
    weights.
    device: where to run and to put the file's weights, such as "cuda". By default the device of a
    module given as `weights`, else the CPU if the file has a program for it, else the current GPU.

    Raises SavedFileError if the file is damaged, of another version, or for another processor or
    GPU; WeightsError if the weights do not fit.
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
    programs = enumerate(json.loads(entries["programs.json"]))
    chosen = [(k, x) for k, x in programs if x.get("target", "cpu") == target]
    if gpu is None:
        libraries = Libraries(manifest, entries)
        open_one = _open_on_cpu(libraries)
    else:
        open_one = _open_on_gpu(target, entries, gpu)
    own = {} if weights is not None else _tensors(entries["weights.safetensors"], place)
    held = _tensors(entries["held.safetensors"], place)
    own, held = ({n: _lay_out(t, laid[n]) for n, t in x.items()} for x in (own, held))
    if weights is None and "panels.json" in entries:  # such a file has CPU programs only
        names = {unit: name for _, x in chosen for unit, name in x["libraries"].items()}
        named = {one["name"]: one for one in state}

        def library_of(dtype: torch.dtype) -> ctypes.CDLL:
            return libraries.open(names[products_of(dtype)])

        own |= open_panels(entries, json.loads(entries["panels.json"]), named, library_of, held)
    if isinstance(weights, nn.Module):
        own = {k: v for k, v in weights.state_dict(keep_vars=True).items() if v is not None}
    model = SavedModule(manifest, state, own, held, place)
    if weights is not None and not isinstance(weights, nn.Module):
        load_weights(model, weights)
    for number, tables in chosen:
        call = _read_call(model, number, tables, open_one, held)
        part = tables.get("part", "")
        table = model._parts.setdefault(part, CallTable(place)) if part else model._table
        table.add(call, tables["call"])
    if "decoder.json" in entries:
        model._decoder = json.loads(entries["decoder.json"])
    return model


def holds_weights(path: str | PathLike[str]) -> bool:
    """Return whether a file was saved with its weights; raise SavedFileError if it is damaged."""
    return bool(read_container(Path(path))[0]["weights"])


def _owner_of(model: nn.Module, part: str, owner: str) -> nn.Module:
    """Return the module that the parameter paths of a part refer to."""
    if part != "steps":
        return model.get_submodule(owner)
    holder = nn.Module()  # as `capture.cached_call.CachedCall` holds the model
    holder.add_module("model", model)
    return holder


def _open_on_cpu(libraries: Libraries) -> Opener:
    def open_one(
        tables: Mapping[str, Any], executable: Executable, weights: Weights
    ) -> tuple[CpuExecutor, None]:
        opened = {unit: libraries.open(name) for unit, name in tables["libraries"].items()}
        return CpuExecutor(executable, weights, opened), None

    return open_one


def _open_on_gpu(target: str, entries: Mapping[str, bytes], device: Device) -> Opener:
    variants = read_variants(target, entries)
    graphs: dict[int, GraphCache] = {}  # programs of one call share a cache

    def open_one(
        tables: Mapping[str, Any], executable: Executable, weights: Weights
    ) -> tuple[SavedQueue, GraphCache]:
        families = [SavedFamily.of(t, variants) for t in tables["families"]]
        queue = SavedQueue(executable, families, weights, device)
        return queue, graphs.setdefault(tables["variant"], GraphCache(tables["graphs"]))

    return open_one


def _read_call(
    model: SavedModule, number: int, tables: Mapping[str, Any], open_one: Opener,
    held: Mapping[str, torch.Tensor],
) -> SavedCall:  # fmt: skip
    """Return a program of the file. number: its place among the programs, for files that do not say
    which variant it is of. held: the tensors that programs need besides the model's own."""
    place = model._place
    prefix = f"{tables.get('variant', number)}.constants."
    constants = {n.removeprefix(prefix): t for n, t in held.items() if n.startswith(prefix)}
    executable, rules, floats, decisions = decode_program(tables, place)
    owner = _owner_of(model, tables.get("part", ""), tables.get("owner", ""))
    weights = _read_weights(tables["weights"], owner, constants, place)
    runtime, graphs = open_one(tables, executable, weights)
    packing = decode_packing(tables, place)
    program = make_program(executable, runtime, model._pool, MAX_SHAPES, packing, graphs)
    ambient, asked = decode_ambient(tables["ambient"])
    returned = (
        ReturnedContainer(tuple(given), tuple(made), changed)
        for given, made, changed in tables.get("returned", ())
    )
    return SavedCall(
        program, ShapeMatcher(rules), floats, ambient, asked, decisions, tables["out"],
        tuple(tables.get("stepping", ())), tuple(returned),
    )  # fmt: skip


def _read_weights(
    described: Mapping[str, Any], model: nn.Module, constants: Mapping[str, torch.Tensor],
    place: torch.device,
) -> Weights:  # fmt: skip
    """Return a program's weights, on the device of its parameters."""
    nodes = decode_nodes(described["hoisted"], place)
    hoisted = {name: nodes[name] for name in described["hoisted_names"]}
    kinds = Decoder(place).decode(described["kinds"])
    return Weights(model, constants, described["paths"], hoisted, kinds)


def _tensors(data: memoryview, place: torch.device) -> dict[str, torch.Tensor]:
    """Return the tensors of an entry over mapped memory, or on a GPU."""
    return {name: tensor.to(place) for name, tensor in read_tensors(data).items()}


class SavedModule(nn.Module):
    """The calls of a saved model. Its parameters have the model's own names, and may be changed.

    Outputs have the model's nesting. A custom output class (such as Hugging Face's) is used if its
    package is imported already; otherwise it becomes an ordered dict with attributes.
    """

    compiled_by_turbotx = True
    """Makes `turbotx.optimize` and `turbotx.explain` refuse it with a clear message."""

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
        self._table = CallTable(place)
        self._parts: dict[str, CallTable] = {}
        self._decoder: Mapping[str, Any] | None = None
        self._opened: Any = None
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

    # --- calls ---

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run a call and return the model's output. Raises InputError if the file has no program
        for it, TrainingError in training mode or if an input requires grad."""
        if self.training:
            raise TrainingError("a saved model is for inference only: call .eval()")
        given, cache = self._split(args, kwargs)
        if cache is not None:
            return self._open_decoder().steps.run(given, cache)
        return self._table.run(args, kwargs)

    __call__ = forward

    def packed(self, *, lengths: Any = None, longest: int | None = None, **inputs: Any) -> Any:
        """Run sequences of different lengths without padding, as `packed` of an optimized module
        does.

        Raises InputError for a call that no program of the file serves over tokens.
        """
        if not self.packs:
            raise InputError('the file was not saved of a module of optimize(padding="packed")')
        return self._table.run_packed(
            read_sequences(lengths, longest, inputs), self.saved_by["model"]
        )

    @property
    def packs(self) -> bool:
        """Whether its programs run over tokens."""
        return any(isinstance(program, PackedProgram) for program in self.programs())

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' `generate`, with every forward run by the programs of the file.

        Raises InputError if the file holds no calls with a key/value cache.
        """
        if self._decoder is None:
            raise InputError(
                "the file holds no calls with a key/value cache: call generate of the optimized "
                "module once before it is saved"
            )
        return self._open_decoder().model.generate(*args, **kwargs)

    def _split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Return a call's arguments by name, less its cache, and that; {} and None without one, or
        where the file holds no steps."""
        if self._decoder is None:
            return {}, None
        names = self._decoder["arguments"]
        return split_cache(args, kwargs, lambda: names)

    def _open_decoder(self) -> Any:
        with self._lock:
            if self._opened is None:
                from turbotx.saved.decoder import open_decoder  # imported late: needs transformers

                assert self._decoder is not None
                self._opened = open_decoder(self, self._decoder, self._parts)
            return self._opened

    def refresh(self) -> None:
        """Recompute packed weights and constants at the next call, like `optimize`'s refresh."""
        for program in self.programs():
            program.runtime.weights.forget()

    @property
    def has_plain_calls(self) -> bool:
        """Whether the file has calls without a key/value cache."""
        return bool(self._table.calls())

    def table_of(self, steps: bool) -> CallTable:
        """Return the file's calls with a key/value cache, or those without one.

        Raises InputError where it has none of them.
        """
        table = self._parts.get("steps") if steps else self._table
        if table is None or not table.calls():
            kind = "with" if steps else "without"
            raise InputError(f"the file holds no call {kind} a key/value cache: make one of them "
                             "before the model is saved")  # fmt: skip
        return table

    def plain_call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[CallTable, tuple[Any, ...], dict[str, Any]]:
        """Return the calls of the file among which this one is, and it as they take it: a key/value
        cache as plain tensors, over a copy of what it holds."""
        given, cache = self._split(args, kwargs)
        if cache is not None:
            return self.table_of(True), (), self._open_decoder().steps.describe(given, cache)
        return self.table_of("kv_memory" in kwargs), args, kwargs

    def programs(self) -> list[Program]:
        """Return the programs of all calls, in file order."""
        tables = (self._table, *self._parts.values())
        return [call.program for table in tables for call in table.calls()]

    def stats(self) -> dict[str, int]:
        """Return counts since loading: programs, builds, plans, graphs, allocations; for a decoder
        that has generated, also the current and peak bytes of its caches."""
        programs = self.programs()
        pool = self._pool.stats()
        opened, caches = self._opened, {}
        if opened is not None:
            caches = opened.steps.budget.stats()
        return {
            **caches,
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
        return f"<turbotx.SavedModule of {self.saved_by['model']}: {self._table.show()}>"


def _make_tensor(
    one: Mapping[str, Any], own: Mapping[str, torch.Tensor], place: torch.device
) -> torch.Tensor:
    """Return a tensor of the state: the given one, or uninitialized memory to be filled later."""
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
    """Return a tensor with the model's strides: files hold contiguous tensors, programs read by
    strides."""
    if list(tensor.stride()) == strides:
        return tensor
    part = tensor
    for d, stride in enumerate(strides):
        if stride == 0 and tensor.shape[d] > 1:
            part = part.narrow(d, 0, 1)
    return part.new_empty_strided(part.shape, strides).copy_(part).expand(tensor.shape)
