"""Values: the plain values in a saved program's JSON, and their decoding.

In: dtypes, constants, nested inputs and outputs. Out: plain JSON, and the same values again; texts
of sizes are checked to be arithmetic before they are compiled::

    encode_tree((Leaf(0), {"past": None}))  ->  {"tuple": [{"leaf": 0}, {"dict": [["past", ...]]}]}
    check_texts(["4 * seq + 32"], ["batch", "seq"])
"""

from __future__ import annotations

import ast
import sys
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from turbotx.capture.returned import Extents
from turbotx.errors import SavedFileError, SaveError
from turbotx.ir.size_functions import PYTHON_NAMES


@dataclass(frozen=True)
class Leaf:
    """A leaf in a nested value: a tensor, size or constant, by index."""

    index: int


class SavedOutput(OrderedDict[str, Any]):
    """Replaces a model's own output class if its package is not imported.

    Entries can be accessed by name, by attribute and, as in a tuple, by index.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the output has no {name!r}, only {', '.join(self)}") from None

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the entries' values in order."""
        return tuple(self.values())


# --- constants ---


def encode_constant(value: Any) -> Any:
    """Return a plain constant as JSON; raise SaveError for anything else."""
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, float):
        return {"float": value.hex()}  # JSON has neither infinities nor NaN
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise SaveError(f"a {type(value).__name__} cannot be saved: {value!r}")


def decode_constant(value: Any) -> Any:
    """Return the constant that was encoded; raise SavedFileError for a name that PyTorch lacks."""
    if not isinstance(value, dict):
        return value
    ((kind, text),) = value.items()
    if kind == "float":
        return float.fromhex(text)
    if kind == "device":
        return torch.device(text)
    types = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
    found = getattr(torch, text, None)
    if kind not in types or not isinstance(found, types[kind]):
        raise SavedFileError(f"the file refers to {kind} {text!r}, which PyTorch does not know")
    return found


# --- ambient state ---


def encode_ambient(ambient: Sequence[Any], asked: Sequence[int]) -> dict[str, Any]:
    """Return the ambient state of a trace as JSON. asked: the indices of what its Python code
    read."""
    autocast, dtype, modes, *rest = ambient
    on = [[device, encode_constant(kind)] for device, kind in autocast]
    return {"state": [on, encode_constant(dtype), list(modes), *rest], "asked": list(asked)}


def decode_ambient(value: Mapping[str, Any]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Return the ambient state, and the indices of what was read."""
    autocast, dtype, modes, *rest = value["state"]
    on = tuple((device, decode_constant(kind)) for device, kind in autocast)
    return (on, decode_constant(dtype), tuple(modes), *rest), tuple(value["asked"])


# --- nested values ---


def encode_tree(value: Any) -> Any:
    """Return nested tuples, lists, dicts and records of leaves and constants as JSON."""
    if isinstance(value, Leaf):
        return {"leaf": value.index}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        fields = zip(value._fields, value, strict=True)
        return {"named": _place(type(value)), "items": [[k, encode_tree(v)] for k, v in fields]}
    if isinstance(value, Extents):
        return {"size": [encode_tree(v) for v in value]}
    if type(value) in (tuple, list):
        return {type(value).__name__: [encode_tree(v) for v in value]}
    if isinstance(value, Mapping):
        items = [[_key(k), encode_tree(v)] for k, v in value.items()]
        if type(value) in (dict, OrderedDict):
            return {"dict": items}
        return {"record": _place(type(value)), "items": items}
    return {"constant": encode_constant(value)}


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise SaveError(f"a dict with the key {key!r} cannot be saved: keys must be strings")
    return key


def _place(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def decode_tree(value: Mapping[str, Any], leaves: Callable[[int], Any]) -> Any:
    """Return the nested value, with `leaves(k)` in place of leaf k."""
    if "leaf" in value:
        return leaves(value["leaf"])
    if "constant" in value:
        return decode_constant(value["constant"])
    if "size" in value:
        return torch.Size(decode_tree(v, leaves) for v in value["size"])
    for kind in (tuple, list):
        if kind.__name__ in value:
            return kind(decode_tree(v, leaves) for v in value[kind.__name__])
    pairs = value["dict"] if "dict" in value else value["items"]
    items = {k: decode_tree(v, leaves) for k, v in pairs}
    if "dict" in value:
        return items
    found = _imported(value.get("named") or value["record"])
    if "named" in value:
        made: Any = found or namedtuple(value["named"].rpartition(".")[2], list(items))
        return made(**items)
    return SavedOutput(items) if found is None else found(**items)


def _imported(place: str) -> Any:
    """Return a class if its module is already imported; otherwise None."""
    module, _, name = place.partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


# --- sizes ---

_ARITHMETIC = (
    ast.Expression, ast.Load, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod,
    ast.BitAnd, ast.BitOr, ast.BitXor, ast.UnaryOp, ast.USub, ast.Not, ast.BoolOp, ast.And, ast.Or,
    ast.IfExp, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
)  # fmt: skip


def check_texts(texts: Sequence[str], dims: Sequence[str]) -> None:
    """Raise SavedFileError for a text that is not arithmetic on the dims."""
    for text in texts:
        try:
            tree = ast.parse(text, mode="eval")
        except (SyntaxError, TypeError, ValueError) as error:
            raise SavedFileError(f"the file has sizes that are not arithmetic: {error}") from error
        for node in ast.walk(tree):
            if not _is_arithmetic(node, dims):
                raise SavedFileError(f"the file has sizes that are not arithmetic: {text}")


def _is_arithmetic(node: ast.AST, dims: Sequence[str]) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float))
    if isinstance(node, ast.Name):
        return node.id in dims or node.id in PYTHON_NAMES
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and not node.keywords
    return isinstance(node, _ARITHMETIC)
