"""Save: what an optimized model has compiled so far becomes one file (docs/saving.md).

In: something that `optimize` made, called at least once. Out: a file with every compiled call:
launches, plan tables, kernels as machine code and as C++, and the weights::

    turbotx.save(fast, "model.ttx")
    turbotx.save(fast, "program.ttx", weights=False)    # to be given weights when it is loaded
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from turbotx import __version__
from turbotx.engine import Variant
from turbotx.errors import SaveError
from turbotx.kernels.build import build_library
from turbotx.optimized import engine_of
from turbotx.runtime.cpu import CpuRuntime
from turbotx.runtime.native import load_runtime
from turbotx.saved.container import write_container
from turbotx.saved.describe import describe_variant
from turbotx.saved.native import cpu_features, runtime_digest
from turbotx.saved.values import Leaf, encode_constant, encode_tree


def save(optimized: Any, path: str | PathLike[str], *, weights: bool = True) -> None:
    """Write every call that `optimized` has compiled so far to one file.

    weights: also write the model's parameters and buffers (needs the extra `weights`); without them
    `turbotx.load` is given them. Buffers that are no part of the state dict are always written.

    Raises SaveError where nothing was compiled yet, or the model cannot be saved; OSError where the
    file cannot be written.
    """
    engine = engine_of(optimized)
    variants = engine.keyed_variants()
    if not variants:
        raise SaveError("nothing was compiled yet: call the module once, then save it")
    entries: dict[str, bytes] = {}
    programs = []
    for key, variant in variants:
        names = {}
        for unit, (library, sources) in _kernels_of(variant).items():
            names[unit] = f"{unit}-{hashlib.sha256(library).hexdigest()[:16]}"
            entries[f"{names[unit]}.so"] = library
            for name, text in sources.items():
                entries[f"{names[unit]}/{name}.cpp"] = text.encode()
        programs.append({
            "call": _describe_call(key), "libraries": names, **describe_variant(variant),
        })  # fmt: skip
    state, held = _split_weights(engine.model, [v for _, v in variants])
    facts: dict[str, Any] = {
        "turbotx": __version__, "torch": torch.__version__, "runtime": runtime_digest(),
        "machine": platform.machine(), "cpu_features": sorted(cpu_features()),
        "model": type(engine.model).__name__, "weights": weights,
    }  # fmt: skip
    entries["programs.json"] = json.dumps(programs).encode()
    entries["state.json"] = json.dumps(_describe_state(engine.model, state)).encode()
    entries["held.safetensors"] = _to_safetensors(held)
    if weights:
        entries["weights.safetensors"] = _to_safetensors(_without_ties(state))
    write_container(Path(path), entries, facts)


def _kernels_of(variant: Variant) -> dict[str, tuple[bytes, Mapping[str, str]]]:
    """Return machine code and sources by library: the generated kernels', and the runtime's.

    The runtime's source is turbotx's own, and not in the file.
    """
    runtime = variant.program.runtime
    if not isinstance(runtime, CpuRuntime):
        raise SaveError("only programs for the CPU can be saved")
    if not runtime.is_native:
        raise SaveError(
            "its kernels were not built, so that there is nothing to save: install a C++ compiler, "
            "or leave out backend='aten'"
        )
    found: dict[str, tuple[Any, Mapping[str, str]]] = {"runtime": (load_runtime()[0], {})}
    if runtime.sources:
        found["kernels"] = (build_library(runtime.sources)[0], runtime.sources)
    return {
        name: (Path(library._name).read_bytes(), sources)
        for name, (library, sources) in found.items()
    }


def _describe_call(key: Any) -> dict[str, Any]:
    """Return a call's signature: its arguments' structure, dtypes and ranks, and constants."""
    spec, described = key
    tensors: list[list[Any]] = []
    tree: list[Any] = []
    for one in described:
        if len(one) == 3 and isinstance(one[0], torch.dtype):
            dtype, device, rank = one
            if device.type != "cpu":
                raise SaveError(f"a call with an input on {device} cannot be saved: CPUs only")
            tree.append(Leaf(len(tensors)))
            tensors.append([encode_constant(dtype), rank])
        else:
            tree.append(one[1])
    return {"inputs": tensors, "tree": encode_tree(pytree.tree_unflatten(tree, spec))}


# --- weights ---


def _split_weights(
    model: nn.Module, variants: list[Variant]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the state dict's tensors, and those that programs need and it does not have."""
    state = {k: v.detach() for k, v in model.state_dict(keep_vars=True).items()}
    held: dict[str, torch.Tensor] = {}
    for k, variant in enumerate(variants):
        for path, tensor in variant.program.runtime.weights.owned():
            if path.startswith("constants."):
                held[f"{k}.{path}"] = tensor.detach()
            elif path not in state:
                held[path] = tensor.detach()
    return state, held


def _describe_state(model: nn.Module, state: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    first: dict[Any, str] = {}
    return [
        {
            "name": name,
            "dtype": encode_constant(tensor.dtype),
            "shape": list(tensor.shape),
            "parameter": name in parameters,
            "tied_to": first.setdefault(_memory(tensor), name),
        }
        for name, tensor in state.items()
    ]


def _without_ties(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first: dict[Any, str] = {}
    return {k: v for k, v in state.items() if first.setdefault(_memory(v), k) == k}


def _memory(tensor: torch.Tensor) -> Any:
    if tensor.numel() == 0:
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _to_safetensors(tensors: dict[str, torch.Tensor]) -> bytes:
    if not tensors:
        return b""
    try:
        from safetensors.torch import save as to_bytes
    except ImportError as error:
        raise SaveError("saving weights needs safetensors: pip install 'turbotx[weights]'") from (
            error
        )
    dense = {k: v.contiguous() for k, v in tensors.items()}
    # One tensor's memory under two names, as of overlapping views, is written twice.
    seen: set[int] = set()
    for name, tensor in dense.items():
        if tensor.numel() and tensor.untyped_storage().data_ptr() in seen:
            dense[name] = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
    return bytes(to_bytes(dense))
