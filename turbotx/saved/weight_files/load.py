"""Load: copies a file's entries into a model's parameters and buffers, after checking all of them.

In: a model and a path. Out: the model changed in place; or a WeightsError that lists missing and
extra entries and those with another shape or dtype, and the model unchanged::

    load_weights(model, "weights.safetensors")
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from turbotx.errors import WeightsError
from turbotx.saved.weight_files.read import read_weights
from turbotx.saved.weight_files.turbotransformers import is_packed, unpack

log = logging.getLogger("turbotx")
SHOWN = 20


def load_weights(model: nn.Module, path: str | PathLike[str]) -> None:
    """Fill `model`'s parameters and buffers in place with the values of a file.

    path: safetensors, a sharded checkpoint's index.json, a PyTorch state dict (read with
    weights_only=True), `.npz`, or a folder with one of these under its usual name. Entries have the
    names of `model.state_dict()`; BERT's may be packed as in TurboTransformers. Of tied weights,
    one name suffices. Non-persistent buffers are loaded if present.
    dtypes: the model keeps its own. Lossless conversions are made (bfloat16 to float32, an integer
    to a wider one); any other difference is an error: convert the model, load, and convert it back.

    Raises WeightsError with every name that is missing, extra, or of another shape or dtype; the
    model is unchanged then.
    """
    targets = _targets(model)
    entries = read_weights(Path(path))
    if is_packed(entries, targets):
        entries = unpack(entries)
    chosen = _match(Path(path), model, entries, targets)
    with torch.no_grad():
        for name, tensor in chosen.items():
            targets[name].copy_(tensor)
    log.info("loaded %d tensors from %s", len(chosen), path)


def _targets(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter and buffer by each of its names."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    return found


def _match(
    path: Path,
    model: nn.Module,
    entries: Mapping[str, torch.Tensor],
    targets: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return what to copy where; raise WeightsError with everything that does not fit."""
    groups: dict[object, list[str]] = {}
    for name, tensor in targets.items():
        groups.setdefault(_storage(tensor), []).append(name)
    needed = set(model.state_dict())
    chosen: dict[str, torch.Tensor] = {}
    missing: list[str] = []
    wrong: list[str] = []
    for names in groups.values():
        given = [n for n in names if n in entries]
        if not given:
            missing += [n for n in names if n in needed]
            continue
        problem = _difference(given[0], entries[given[0]], targets[given[0]])
        for other in given[1:]:
            if not problem and not torch.equal(entries[given[0]], entries[other]):
                problem = f"{given[0]} and {other} are one tensor in the model, two in the file"
        if problem:
            wrong.append(problem)
        chosen[given[0]] = entries[given[0]]
    extra = [n for n in entries if n not in targets]
    if missing or extra or wrong:
        raise WeightsError(_complaint(path, type(model).__name__, missing, extra, wrong))
    return chosen


def _storage(tensor: torch.Tensor) -> object:
    """Return a key that is equal for two names of one tensor."""
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _difference(name: str, given: torch.Tensor, own: torch.Tensor) -> str:
    """Return why an entry cannot be copied to the model's tensor; "" if it can."""
    if own.device.type == "meta":
        return f"{name} has no memory in the model (device meta): make it with to_empty first"
    if given.shape != own.shape:
        return f"{name} has shape {tuple(given.shape)}, the model's {tuple(own.shape)}"
    if given.dtype != own.dtype and not _widens(given.dtype, own.dtype):
        return f"{name} is {_short(given.dtype)}, the model's {_short(own.dtype)}"
    return ""


def _widens(given: torch.dtype, own: torch.dtype) -> bool:
    """Return whether a dtype converts to another of the same kind without loss."""
    kinds = [(d.is_floating_point, d.is_complex, d is torch.bool) for d in (given, own)]
    return kinds[0] == kinds[1] and torch.promote_types(given, own) == own


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _complaint(
    path: Path, model: str, missing: list[str], extra: list[str], wrong: list[str]
) -> str:
    lines = [f"{path} does not fit {model}, which was left as it is"]
    for title, names in (
        ("missing from the file", missing),
        ("in the file, not in the model", extra),
        ("different", wrong),
    ):
        if names:
            more = f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"{len(names)} {title}: {'; '.join(names[:SHOWN])}{more}")
    hint = _prefix_hint(missing, extra)
    return "\n  ".join([*lines, hint] if hint else lines)


def _prefix_hint(missing: list[str], extra: list[str]) -> str:
    """Return a hint if names differ only by a prefix, as those of a model with a head on top."""
    for longer, shorter, where in ((extra, missing, "file"), (missing, extra, "model")):
        known = set(shorter)
        for name in longer[:SHOWN]:
            prefix, dot, rest = name.partition(".")
            if dot and rest in known:
                return (
                    f"the {where}'s names begin with '{prefix}.': take the submodule {prefix!r}, "
                    "or save the state dict of that part"
                )
    return ""
