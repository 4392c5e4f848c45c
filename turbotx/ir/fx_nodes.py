"""Queries on fx nodes (shape, strides, dtype, arguments), and insertion of new nodes.

In: nodes of a captured graph, whose `meta["val"]` is a FakeTensor. Out: shapes as sympy expressions
over the named dims, and new nodes with the same metadata, for example::

    shape(node)  ->  (batch, seq, 384)
    emit(graph, aten.permute.default, node, (0, 2, 1))
"""

from __future__ import annotations

import operator
import os
import re
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true

from turbotx.errors import CaptureError
from turbotx.ir.expr import ONE, Expr, cancel_rounding, expr, name_functions
from turbotx.ir.fake_results import fake_result

GETITEM = operator.getitem
# Prefixes of the paths in stack traces that are not the user's; torch's own graph passes appear
# without a folder.
_FOLDERS = (Path(torch.__file__).parent, Path(__file__).parents[1])
LIBRARIES = (*(f"{folder}{os.sep}" for folder in _FOLDERS), "torch/")

_names: weakref.WeakKeyDictionary[ShapeEnv, dict[sympy.Symbol, sympy.Symbol]]
_names = weakref.WeakKeyDictionary()
_ones: weakref.WeakKeyDictionary[ShapeEnv, dict[Expr, bool]]
_ones = weakref.WeakKeyDictionary()
_renamed: weakref.WeakKeyDictionary[ShapeEnv, dict[Any, Expr]]
_renamed = weakref.WeakKeyDictionary()
# The key in a node's meta of its shape, with what that was found from: the fake tensor, the version
# of what is known of its sizes, and how often names were given.
_SHAPE = "turbotx_shape"
_times_named = 0


def remember_names(
    graph_module: fx.GraphModule, symbols: Mapping[sympy.Symbol, sympy.Symbol]
) -> None:
    """Register names for this graph's symbols, so that `shape` returns expressions in named
    dims."""
    global _times_named
    _times_named += 1
    for node in graph_module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor) and value.fake_mode.shape_env is not None:
            _names.setdefault(value.fake_mode.shape_env, {}).update(symbols)
            _renamed.pop(value.fake_mode.shape_env, None)
            return


def _rename(value: Expr, shape_env: ShapeEnv | None, whole: bool) -> Expr:
    """Return a value over the named dims. Only a `whole` number is expanded: expanding a float
    would change where it is rounded."""
    if value.is_Integer or shape_env is None:
        return value
    renamed = shape_env.replace(value).xreplace(_names.get(shape_env, {}))
    return sympy.expand(name_functions(cancel_rounding(renamed))) if whole else renamed


def tensor(node: fx.Node) -> torch.Tensor:
    """Return the node's fake tensor; raise TypeError if its value is not a tensor."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{node.format_node()} does not produce one tensor")
    return value


def is_tensor(node: Any) -> bool:
    """Return whether `node` is an fx node whose traced value, `meta["val"]`, is a tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def is_size(node: fx.Node) -> bool:
    """Return whether a node's value is a number computed from sizes, not from tensor elements."""
    value = node.meta.get("val")
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def is_view(node: fx.Node) -> bool:
    """Return whether a call's result shares an argument's memory, as its schema says."""
    schema: Any = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info for r in schema.returns)


def is_random(node: fx.Node) -> bool:
    """Return whether a call draws random numbers: its result varies, and it advances the
    generator."""
    if node.op != "call_function":
        return False
    return draws(node.target, node.args, node.kwargs)


def draws(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an op draws random numbers when called with these arguments.

    PyTorch tags ops that may draw; dropout only does when training, attention only with dropout.
    """
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return False
    given = {a.name: kwargs.get(a.name, a.default_value) for a in target._schema.arguments}
    given |= {a.name: v for a, v in zip(target._schema.arguments, args, strict=False)}
    if any(given.get(name, True) is False for name in ("train", "training")):
        return False
    chances = ("p", "dropout") if "dropout" in target._opname else ("dropout", "dropout_p")
    return all(given.get(name, 1) != 0 for name in chances)


def shape(node: fx.Node) -> tuple[Expr, ...]:
    """Return the node's shape over the named dims."""
    value = tensor(node)
    shape_env = getattr(getattr(value, "fake_mode", None), "shape_env", None)
    version = getattr(shape_env, "_replacements_version_counter", None)  # in 2.11 to 2.13
    known = node.meta.get(_SHAPE)
    if known is None or known[0] is not value or known[1:3] != (version, _times_named):
        found = sizes_of(value)
        known = node.meta[_SHAPE] = (value, version, _times_named, found)
    shape: tuple[Expr, ...] = known[3]
    return shape


def sizes_of(value: torch.Tensor) -> tuple[Expr, ...]:
    """Return the sizes of a fake tensor over the named dims."""
    return tuple(size(s) for s in value.shape)


def strides(node: fx.Node) -> tuple[Expr, ...]:
    """Return the strides, in elements, of the node's tensor in eager mode."""
    value = tensor(node)
    return tuple(size(s) for s in value.stride())


def dtype(node: fx.Node) -> torch.dtype:
    """Return the dtype of a node's tensor; raise TypeError if its value is not a tensor."""
    return tensor(node).dtype


def size(value: Any) -> Expr:
    """Return a number, a symbolic number, or a node whose value is one, as an expression."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if isinstance(value, (int, float, sympy.Basic)):
        return expr(value)
    shape_env = value.node.shape_env
    version = getattr(shape_env, "_replacements_version_counter", None)  # in 2.11 to 2.13
    key = value.node.expr, type(value), version
    known = {} if version is None else _renamed.setdefault(shape_env, {})
    if key not in known:
        whole = isinstance(value, torch.SymInt)
        is_one = whole and _is_one(value)
        known[key] = ONE if is_one else _rename(expr(value), shape_env, whole)
    return known[key]


def is_negative(value: Any) -> bool:
    """Return whether a position (an int or a node with such a value) counts from the end.

    Tracing has decided this wherever it matters, as for 32 - seq. Raises CaptureError where it has
    not: a guess would read other elements.
    """
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if not isinstance(value, torch.SymInt):
        return value is not None and bool(value < 0)
    for known, answer in ((value < 0, True), (value >= 0, False)):
        if statically_known_true(known):
            return answer
    whole = value.node.expr.expand()
    for fact in _assumptions(value.node.shape_env):
        if isinstance(fact, (sympy.Gt, sympy.Le)):  # in the other direction
            fact = fact.reversed
        if isinstance(fact, (sympy.Lt, sympy.Ge)) and (fact.lhs - fact.rhs).expand() == whole:
            return isinstance(fact, sympy.Lt)
    raise CaptureError(
        f"whether the position {expr(value)} counts from the end depends on the sizes of a call, "
        "and the trace has not asked: write max(..., 0) or min(..., -1) around it"
    )


def _assumptions(shape_env: ShapeEnv) -> Iterator[Any]:
    """Yield what the trace has assumed of sizes, one relation at a time."""
    for guard in shape_env.guards:
        yield from sympy.And.make_args(guard.expr)


def _is_one(value: torch.SymInt) -> bool:
    """Return whether a size is 1 under the assumptions of the trace, so that it broadcasts.

    For example seq // 2, if tracing has branched on seq < 4.
    """
    whole, shape_env = value.node.expr, value.node.shape_env
    if whole.is_Integer or whole.is_Symbol:
        return bool(whole == 1)
    known = _ones.setdefault(shape_env, {})
    if whole not in known:
        equal = sympy.Eq(whole, 1), sympy.Eq(1, whole)
        assumed = any(fact in equal for fact in _assumptions(shape_env))
        known[whole] = assumed or statically_known_true(value == 1)
    return known[whole]


def fake(value: Any) -> Any:
    """Return an argument with every node replaced by its fake value."""
    return fx.node.map_arg(value, lambda n: n.meta["val"])


def emit(like: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Append `target(*args, **kwargs)` at the insertion point, with its fake value computed.

    like: the call that it replaces, whose source location the new node inherits. Raises TypeError
    if neither that nor any argument is a tensor.
    """
    name = getattr(getattr(target, "overloadpacket", target), "__name__", None)
    node = like.graph.create_node("call_function", target, args, kwargs, name=name)
    sources = [n for n in (*node.all_input_nodes, like) if is_tensor(n)]
    if not sources:
        raise TypeError(f"{target} has no tensor argument")
    mode = sources[0].meta["val"].fake_mode
    node.meta["val"] = fake_result(target, fake(args), fake(kwargs), mode)
    _keep_origin(like, node)
    return node


def emit_piece(like: fx.Node, pieces: fx.Node, k: int) -> fx.Node:
    """Append `pieces[k]`, one tensor of a split."""
    node = like.graph.call_function(GETITEM, (pieces, k))
    node.meta["val"] = pieces.meta["val"][k]
    _keep_origin(like, node)
    return node


def target_name(node: fx.Node) -> str:
    """Return the name of what a node calls or reads, the same in every process: "aten.add.Tensor",
    an attribute's path, or a function's module and name."""
    target = node.target
    if isinstance(target, types.FunctionType):
        return f"{target.__module__}.{target.__qualname__}"
    return str(target)


def fake_mode_of(tree: Any) -> Any:
    """Return the fake mode of the first fake tensor in a tree; None if it holds none."""
    leaves = pytree.tree_leaves(tree)
    return next((x.fake_mode for x in leaves if isinstance(x, FakeTensor)), None)


def meta_without_value(node: fx.Node) -> dict[str, Any]:
    """Return what a node made for another one inherits: all but what describes its value."""
    return {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta")}


def _keep_origin(old: fx.Node, new: fx.Node) -> None:
    for key in ("stack_trace", "nn_module_stack"):
        if key in old.meta:
            new.meta[key] = old.meta[key]


def place_of(node: fx.Node) -> str:
    """Return file:line of a call in the user's source, "" if unknown.

    Frames in torch and turbotx are skipped in favour of their callers.
    """
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return next((f"{f}:{n}" for f, n in reversed(frames) if not f.startswith(LIBRARIES)), "")


def module_of(node: fx.Node) -> str:
    """Return the path of the submodule that made a call, "" for the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    if path.startswith("_empty_nn_module_stack"):  # torch.export's marker of its own calls
        return ""
    return path.removeprefix("model").removeprefix(".")


def replace(node: fx.Node, new: fx.Node) -> None:
    """Replace all uses of `node` by `new`, which inherits its source location, and erase `node`."""
    _keep_origin(node, new)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def is_call(node: Any, *targets: Any) -> bool:
    """Return whether `node` is a call of one of these functions or op overloads."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def freeze(value: Any, of_node: Callable[[fx.Node], Any]) -> Any:
    """Return an argument of a call as something to compare and hash, a node as `of_node` says."""
    if isinstance(value, fx.Node):
        return of_node(value)
    if isinstance(value, (list, tuple)):
        return tuple(freeze(v, of_node) for v in value)
    if isinstance(value, dict):
        return tuple((k, freeze(value[k], of_node)) for k in sorted(value))
    return type(value), repr(value)


def operand(node: fx.Node, position: int) -> fx.Node:
    """Return a positional argument, which must be a node."""
    found = node.args[position]
    assert isinstance(found, fx.Node), f"argument {position} of {node.format_node()} is no node"
    return found


def optional(node: fx.Node, position: int) -> fx.Node | None:
    """Return a positional argument that is a node, or None if it is absent."""
    absent = len(node.args) <= position or node.args[position] is None
    return None if absent else operand(node, position)


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """Return an ATen op's argument by its schema name, positional or not. Raises KeyError if the
    schema has no such name."""
    if name in node.kwargs:
        return node.kwargs[name]
    target: Any = node.target
    for position, formal in enumerate(target._schema.arguments):
        if formal.name == name:
            if position < len(node.args) and not formal.kwarg_only:
                return node.args[position]
            return formal.default_value if formal.has_default_value() else default
    raise KeyError(f"{node.target} has no argument {name!r}")
