"""Save: writes everything that an optimized model has compiled to one file (docs/saving.md).

In: an object that `optimize` made, called at least once. Out: a file with every compiled call:
launches, plan tables, kernels as machine code and as C++, and the weights::

    turbotx.save(fast, "model.ttx")
    turbotx.save(fast, "program.ttx", weights=False)    # weights are given when it is loaded
    turbotx.save(fast, "model.ttx", targets=["cpu", "sm_90"])
"""

from __future__ import annotations

import hashlib
import json
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from turbotx import __version__
from turbotx.capture.torchao_weights import is_torchao
from turbotx.engine.compiled import Compiled
from turbotx.engine.engine import Engine
from turbotx.engine.optimize import engine_of
from turbotx.engine.progress import show_progress
from turbotx.engine.variant import Variant
from turbotx.errors import QuantizedWarning, SaveError
from turbotx.kernels.build import build_library
from turbotx.kernels.triton.compiler import build
from turbotx.runtime.cpu.launch_table import load_library
from turbotx.runtime.cpu.runtime import CpuRuntime
from turbotx.runtime.cuda.device import require_triton
from turbotx.runtime.packed_parameter import PackedParameter
from turbotx.saved.container import Stream, write_container
from turbotx.saved.describe import describe_call, describe_families
from turbotx.saved.gpu_kernels import describe_kernel, image_entry, variants_entry
from turbotx.saved.native import cpu_features, runtime_digest
from turbotx.saved.panel_streams import check_sets, describe_panels, find_panels
from turbotx.saved.parts import SavedPart, describe_decoder, find_parts
from turbotx.saved.tensor_file import tensor_stream
from turbotx.saved.values import Leaf, encode_constant, encode_tree
from turbotx.saved.variants import Variants


def save(
    optimized: Any, path: str | PathLike[str], *, weights: bool = True,
    targets: Sequence[str] | None = None, panels: Sequence[str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:  # fmt: skip
    """Write every call that `optimized` has compiled for the model in its current state to one
    file.

    weights: also write the model's parameters and buffers, without copying them first; otherwise
    they must be given to `turbotx.load`. Buffers that are not in the state dict are always written.
    targets: what to write programs for: "cpu", or GPUs such as "sm_90", which need not be present;
    by default where the calls ran. GPU kernels are compiled for every shape, about half a second
    each (needs Triton).
    panels: instruction sets, such as "native" or "avx512_bf16", for which GEMM weights are written
    packed instead of the parameters that they contain: loading maps them, and they are then
    immutable (docs/saving.md). The default is "native" for a model optimized with
    keep_weights=False or quantised, whose file then has no floats of its int8 weights; otherwise,
    or if a target is a GPU, none.
    progress: called after each kernel with the number done, the total and its name; by default
    progress is shown on a terminal.

    Raises SaveError if nothing was compiled yet or the model cannot be saved; OSError if the file
    cannot be written.
    """
    engine = engine_of(optimized)
    variants = _find_variants(engine)
    if engine.calls_forward and (engine.model._forward_hooks or engine.model._forward_pre_hooks):
        raise SaveError(
            f"{type(engine.model).__name__} has forward hooks, which are Python that runs around "
            "its program: remove them, or register them on a submodule, whose hooks are traced"
        )
    wanted = None if targets is None else [check_target(name) for name in targets]
    if wanted == []:
        raise SaveError("targets=[] leaves nothing to save: name some, or leave it out")
    writer = _Writer(engine)
    for number, (part, key, variant) in enumerate(variants):
        for target in dict.fromkeys(wanted or [_target_of(variant.compiled)]):
            compiled = _compile_for(part.engine, variant, target)
            writer.add(number, {**part.describe(variant), "call": key}, target, compiled)
    writer.build(progress)
    state, held = _split_weights(engine.model, [(p, v) for p, _, v in variants])
    found = list(dict.fromkeys(x["target"] for x in writer.programs))
    foreign = next((name for name, tensor in state.items() if is_torchao(tensor)), "")
    if foreign and found != ["cpu"]:
        raise SaveError(
            f"{foreign} is torchao's, whose integers a file holds for CPUs alone: save for "
            f"targets=['cpu'], not {found}"
        )
    facts: dict[str, Any] = {
        "turbotx": __version__, "torch": torch.__version__, "runtime": runtime_digest(),
        "machine": platform.machine(), "cpu_features": sorted(cpu_features()),
        "model": type(engine.model).__name__, "weights": weights, "targets": found,
    }  # fmt: skip
    entries = writer.entries
    described = _describe_state(engine.model, state)
    entries["programs.json"] = json.dumps(writer.programs).encode()
    entries["state.json"] = json.dumps(described).encode()
    facts_of_decoder = describe_decoder(engine)
    if facts_of_decoder is not None:
        entries["decoder.json"] = json.dumps(facts_of_decoder).encode()
    if weights:
        made, scales = _weight_entries(engine, variants, found, described, state, panels)
        entries.update(made)
        held |= scales
    entries["held.safetensors"] = tensor_stream(held) if held else b""
    entries["held.json"] = json.dumps({k: list(v.stride()) for k, v in held.items()}).encode()
    write_container(Path(path), entries, facts)


def _compile_for(engine: Engine, variant: Variant, target: str) -> Compiled:
    """Return a variant compiled for a target; the existing one if it is for that target."""
    if target == _target_of(variant.compiled):
        return variant.compiled
    return engine.compile(variant.compiled.captured, target)


def _find_variants(engine: Engine) -> list[tuple[SavedPart, Any, Variant]]:
    """Return every call to save, with its part and signature; raise SaveError if there is none."""
    # Captures of an earlier state of the model would be mistaken for its current state; those for
    # parameters of another dtype or layout serve no call any more.
    found = [
        (part, key, variant)
        for part in find_parts(engine)
        for key, variant in part.engine.keyed_variants()
        if variant.holds() and not variant.program.runtime.weights.misfit()
    ]
    if not found:
        raise SaveError(
            "nothing was compiled yet for the model as it is: call what turbotx.optimize returned "
            "once, as fast(**inputs), then save that, as turbotx.save(fast, path)"
        )
    for captured in (variant.compiled.captured for _, _, variant in found):
        expanded = [captured.input_names[k] for k, dims in captured.expanded.dims.items() if dims]
        if expanded:
            raise SaveError(
                f"a call of {captured.name} was captured for an expanded tensor {expanded[0]!r}, "
                "whose strides decide those of a result, and a file takes every tensor: optimize "
                f"the model anew, and call it with {expanded[0]}.contiguous()"
            )
    return found


def _target_of(compiled: Compiled) -> str:
    gpu = compiled.program.executable.gpu
    return "cpu" if gpu is None else gpu.target


def check_target(target: str) -> str:
    """Return a supported target; raise SaveError for others."""
    number = target.removeprefix("sm_")
    if target == "cpu" or (number != target and number.isdigit() and int(number) >= 80):
        return target
    raise SaveError(
        f"there are no programs for {target!r}: targets are 'cpu' and NVIDIA GPUs from compute "
        "capability 8.0 on, as 'sm_90'"
    )


class _Writer:
    """Collects programs and the entries that they need."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.entries: dict[str, bytes | Stream] = {}
        self.programs: list[dict[str, Any]] = []
        self._variants: dict[str, Variants] = {}

    def add(self, number: int, said: dict[str, Any], target: str, compiled: Compiled) -> None:
        """Add a call compiled for a target.

        number: of the call.
        said: its signature as "call", and fields that are stored unchanged.
        """
        call = _describe_call(said["call"])
        shared = {**said, "target": target, "variant": number, "call": call}
        if target == "cpu":
            libraries = self._add_libraries(compiled)
            self.programs.append({**shared, "libraries": libraries, **describe_call(compiled)})
            return
        require_triton()
        variants = self._variants.setdefault(target, Variants())
        options = self.engine.options
        graphs = options.max_graphs if options.cuda_graphs else 0
        for specialization in compiled.specializations:
            families = describe_families(specialization, variants)
            own = {"families": families, "graphs": graphs, **describe_call(specialization)}
            self.programs.append({**shared, **own})

    def _add_libraries(self, compiled: Compiled) -> dict[str, str]:
        names = {}
        for unit, (library, sources) in _kernels_of(compiled).items():
            names[unit] = f"{unit}-{hashlib.sha256(library).hexdigest()[:16]}"
            self.entries[f"{names[unit]}.so"] = library
            for name, text in sources.items():
                self.entries[f"{names[unit]}/{name}.cpp"] = text.encode()
        return names

    def build(self, progress: Callable[[int, int, str], None] | None) -> None:
        """Compile all kernels of all targets in parallel, except those cached on disk."""
        jobs = [
            job
            for variants in self._variants.values()
            for job, needed in zip(variants.jobs, variants.needed, strict=True)
            if needed
        ]
        with show_progress("compile kernels") as step:

            def show(done: int, total: int, what: str) -> None:
                step(f"{done}/{total} {what}")

            built = build(jobs, progress=progress or show, measure=False)
        binaries = {b.job.digest(): b.binary() for b in built}
        for target, variants in self._variants.items():
            listed = []
            for job in variants.jobs:
                binary = binaries.get(job.digest())
                listed.append(describe_kernel(binary or job))
                if binary is not None:
                    self.entries[image_entry(binary)] = binary.image
            self.entries[variants_entry(target)] = json.dumps(listed).encode()


def _kernels_of(compiled: Compiled) -> dict[str, tuple[bytes, Mapping[str, str]]]:
    """Return machine code and sources by library: the generated kernels', and those of turbotx
    itself, whose sources are not stored."""
    runtime = compiled.program.runtime
    assert isinstance(runtime, CpuRuntime)
    if not runtime.is_native:
        raise SaveError(
            "its kernels were not built, so that there is nothing to save: install a C++ compiler, "
            "or leave out backend='aten'"
        )
    own = (name for name in runtime.libraries if name != "kernels")
    found: dict[str, tuple[Any, Mapping[str, str]]] = {n: (load_library(n)[0], {}) for n in own}
    if runtime.sources:
        found["kernels"] = (build_library(runtime.sources)[0], runtime.sources)
    return {
        name: (Path(library._name).read_bytes(), sources)
        for name, (library, sources) in found.items()
    }


def _describe_call(key: Any) -> dict[str, Any]:
    """Return a call's signature as JSON: its arguments' structure, dtypes, ranks, and constants."""
    spec, described, _ = key
    tensors: list[list[Any]] = []
    tree: list[Any] = []
    for one in described:
        if len(one) >= 3 and isinstance(one[0], torch.dtype):
            dtype, _, rank, *order = one
            tree.append(Leaf(len(tensors)))
            tensors.append([encode_constant(dtype), rank, *order])
        elif one == (float,):
            tree.append(Leaf(len(tensors)))
            tensors.append(["float", 0])
        else:
            tree.append(one[1])
    if not isinstance(spec, pytree.TreeSpec):
        raise SaveError(
            "a call with an object among its arguments cannot be saved: pass the tensors that it "
            "holds, or a tuple, list or dict of them"
        )
    return {"inputs": tensors, "tree": encode_tree(pytree.tree_unflatten(tree, spec))}


# --- weights ---


def _weight_entries(
    engine: Engine, variants: Sequence[tuple[SavedPart, Any, Variant]], targets: Sequence[str],
    described: Sequence[Mapping[str, Any]], state: Mapping[str, torch.Tensor],
    panels: Sequence[str] | None,
) -> tuple[dict[str, bytes | Stream], dict[str, torch.Tensor]]:  # fmt: skip
    """Return the entries of a state's tensors, packed or as they are, and scales."""
    first_names = {one["name"]: one["tied_to"] for one in described}
    own = {name: state[name] for name in dict.fromkeys(first_names.values())}
    entries: dict[str, bytes | Stream] = {}
    scales: dict[str, torch.Tensor] = {}
    programs = [(part, p) for part, _, variant in variants for p in variant.compiled.programs]
    on_cpus = targets == ["cpu"] and all(isinstance(p.runtime, CpuRuntime) for _, p in programs)
    if panels is None:
        plain = engine.options.keep_weights and engine.options.quantize == "none"
        plain &= not any(map(is_torchao, state.values()))
        panels = ("native",) if on_cpus and not plain else ()
    if panels:
        if not on_cpus:
            raise SaveError(
                "panels are for models that run on CPUs: GPUs' programs read weights as they are. "
                f"Save for {list(targets)} without panels"
            )
        packed = find_panels(programs, state, first_names)
        made = describe_panels(packed, state, check_sets(panels))
        entries = {"panels.json": json.dumps(made[0]).encode(), **made[1]}
        scales = made[2]
        own = {k: v for k, v in own.items() if not any(k in p.paths for p in packed)}
    foreign = [name for name, tensor in own.items() if is_torchao(tensor)]
    if foreign:
        raise SaveError(
            f"{foreign[0]} is torchao's, which is written as panels where programs "
            "multiply by it, and not otherwise: leave out panels=[], or save with weights=False"
        )
    held = [(k, v) for k, v in own.items() if isinstance(v, PackedParameter)]
    given_up = [k for k, v in held if v.weight.scale is not None]
    if given_up:
        warnings.warn(
            f"the file has integers times scales in the place of {given_up[0]!r}, whose floats "
            "were given up (keep_weights=False)", QuantizedWarning, stacklevel=3,
        )  # fmt: skip
    return {**entries, "weights.safetensors": tensor_stream(own)}, scales


def _split_weights(
    model: nn.Module, variants: list[tuple[SavedPart, Variant]]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the tensors of the state dict, and those that programs need besides."""
    state = {
        k: v if isinstance(v, PackedParameter) else v.detach()
        for k, v in model.state_dict(keep_vars=True).items()
    }
    held: dict[str, torch.Tensor] = {}
    for k, (part, variant) in enumerate(variants):
        for program in variant.compiled.programs:
            for path, tensor in program.runtime.weights.owned():
                if path.startswith("constants."):
                    held[f"{k}.{path}"] = tensor.detach()
                elif part.path_of(path) not in state:
                    held[part.path_of(path)] = tensor.detach()
    return state, held


def _describe_state(model: nn.Module, state: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    first: dict[Any, str] = {}
    return [
        {
            "name": name,
            "dtype": encode_constant(tensor.dtype),
            "shape": list(tensor.shape),
            "strides": list(tensor.stride()),
            "parameter": name in parameters,
            "tied_to": first.setdefault(_memory(tensor), name),
        }
        for name, tensor in state.items()
    ]


def _memory(tensor: torch.Tensor) -> Any:
    if tensor.numel() == 0 or isinstance(tensor, PackedParameter) or is_torchao(tensor):
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
