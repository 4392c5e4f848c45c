"""Read: reads a file of weights of any supported format; pickled code is never run.

In: a path: safetensors, a sharded checkpoint's index.json, a PyTorch state dict, `.npz`, or a
folder that holds one of them under its usual name. Out: the entries, on the CPU::

    read_weights(Path("model.safetensors"))  ->  {"embeddings.word_embeddings.weight": tensor, ...}
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from turbotx.errors import WeightsError, first_line, kind_and_line

# Names searched for in a folder, in this order.
USUAL_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Keys under which training scripts store a state dict in a checkpoint.
INNER_NAMES = ("state_dict", "model_state_dict", "model")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return all entries of a file by name, in the file's own shapes and dtypes; raise WeightsError
    if it cannot be read."""
    path = _find(path)
    try:
        if path.name.endswith(".index.json"):
            return _read_shards(path)
        return _reader_of(path)(path)
    except WeightsError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise WeightsError(
            f"cannot read {path} as safetensors, .npz or a state dict of PyTorch: "
            f"{kind_and_line(error)}"
        ) from error


def _find(path: Path) -> Path:
    if path.is_dir():
        for name in USUAL_NAMES:
            if (path / name).is_file():
                return path / name
        raise WeightsError(f"{path} holds none of {', '.join(USUAL_NAMES)}: name the file itself")
    if not path.is_file():
        raise WeightsError(f"there is no file {path}")
    return path


def _reader_of(path: Path) -> Callable[[Path], dict[str, torch.Tensor]]:
    """Return the reader of a file, by its content if the suffix is not sufficient: most formats are
    zip files."""
    if path.suffix == ".safetensors":
        return _read_safetensors
    if path.suffix == ".npz":
        return _read_npz
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        return _read_npz if names and all(n.endswith(".npy") for n in names) else _read_torch
    with path.open("rb") as file:
        begin = file.read(9)
    if len(begin) == 9 and begin[8:] == b"{":  # an eight-byte length, then a JSON header
        return _read_safetensors
    return _read_torch


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise WeightsError(
            f"{path} needs the package safetensors: pip install 'turbotx[weights]'"
        ) from error
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a complete safetensors file: {error}") from error


def _read_torch(path: Path) -> dict[str, torch.Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is not a state dict of tensors that can be read without running code from it "
            f"(torch.load with weights_only=True): {first_line(error)}"
        ) from error
    for name in INNER_NAMES:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
            break
    if not isinstance(found, Mapping):
        raise WeightsError(f"{path} holds a {type(found).__name__}, not a state dict")
    return _only_tensors(path, found)


def _only_tensors(path: Path, found: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    wrong = [f"{k} ({type(v).__name__})" for k, v in found.items() if not torch.is_tensor(v)]
    if wrong:
        shown = ", ".join(wrong[:5])
        raise WeightsError(f"{path} is not a state dict: these entries are not tensors: {shown}")
    return {str(name): tensor for name, tensor in found.items()}


def _read_npz(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    with np.load(path, allow_pickle=False) as archive:
        for name in archive.files:
            try:
                # NumPy arrays in files may be read-only or big-endian; tensors may not.
                array = archive[name]
                found[name] = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), "C"))
            except (TypeError, ValueError) as error:
                raise WeightsError(
                    f"{path}: {name} is not a tensor: {first_line(error)}"
                ) from error
    return found


def _read_shards(path: Path) -> dict[str, torch.Tensor]:
    """Read the files listed in an index, which must be beside it, and only the entries it lists."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"].items()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{path} is not a sharded checkpoint's index: no weight_map") from error
    files: dict[str, dict[str, torch.Tensor]] = {}
    found: dict[str, torch.Tensor] = {}
    for name, file in listed:
        if Path(str(file)).name != file:
            raise WeightsError(f"{path} names {file!r}, which is not a file beside it")
        if file not in files:
            shard = path.with_name(file)
            if not shard.is_file():
                raise WeightsError(f"{path} needs {file}, which is not beside it")
            files[file] = _reader_of(shard)(shard)
        if name not in files[file]:
            raise WeightsError(f"{path} says that {file} holds {name}, and it does not")
        found[name] = files[file][name]
    return found
