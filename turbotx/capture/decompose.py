"""Decompose: rewrites composite ops of an exported graph to the ops that the passes know.

In: the graph of a torch.export.ExportedProgram. Out: the same graph, with composite nodes replaced
by their decompositions. Nothing else is traced again, which takes a tenth of the time of
`run_decompositions`::

    transpose(x, 1, 2); dropout(y, 0.1, False); to(z, float32)  ->  permute(x, [0, 2, 1]); y; z
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch.fx.experimental import proxy_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from turbotx.capture.casts import inside
from turbotx.capture.inplace_ops import find_out_of_place
from turbotx.ir.expr import expr
from turbotx.ir.fake_results import UnknownError, describe
from turbotx.ir.fx_nodes import (
    GETITEM,
    draws,
    fake,
    fake_mode_of,
    freeze,
    is_random,
    is_tensor,
    meta_without_value,
)
from turbotx.ir.memory_order import memory_of
from turbotx.ir.size_functions import FUNCTIONS

aten = torch.ops.aten
SIZE_OPS = (aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default)
"""Ops whose results are not tensors; the passes read them as they are."""

IDENTITIES = (aten.detach_.default, aten.detach.default, aten.alias.default)
"""Without gradients their results equal their inputs; the first counts as a mutation."""

_MISTAKEN = frozenset(
    ("aten.multilabel_margin_loss.default", "aten.multilabel_margin_loss_forward.default")
)
"""Ops that PyTorch decomposes to other values than it computes, in 2.11 to 2.13."""


class NotNodeByNode(Exception):
    """The graph contains something that only a trace of the whole decomposes: a mutation or a
    nested graph."""


def decompose_nodes(graph_module: fx.GraphModule, kept: frozenset[str]) -> None:
    """Replace every composite op except those in `kept` ("aten.linear.default"), in place.

    New nodes inherit the metadata of the node that they replace. Raises NotNodeByNode, possibly
    after some nodes were changed, if the graph mutates a tensor that is used elsewhere, calls
    another graph, or an op decomposes into one of these.
    """
    graph = graph_module.graph
    for node in graph.nodes:
        _refuse(node)
    sizes, known = _SizeNodes(graph), dict[Any, _Known]()
    for node in list(graph.nodes):
        sizes.add(node)
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        if node.target in IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in SIZE_OPS or is_random(node) or not node.users:
            continue  # what has no users is erased below: torch.promote_types gives no tensor
        elif _decomposition(node.target, kept) is not None:
            _replace(node, _Recorder(node, sizes, kept), known)
    erase_unused(graph)


def erase_unused(graph: fx.Graph) -> None:
    """Erase nodes without users, except random ops, which later random ops depend on."""
    graph.eliminate_dead_code(lambda node: node.is_impure() or is_random(node))


def _refuse(node: fx.Node) -> None:
    """Raise NotNodeByNode for a node that cannot be decomposed on its own."""
    target = node.target
    if node.op in ("placeholder", "output", "get_attr"):
        if isinstance(node.meta.get("val"), torch.Tensor) or node.op != "get_attr":
            return
    elif isinstance(target, OpOverload):
        if target in IDENTITIES or not target._schema.is_mutable:
            return
    elif getattr(target, "__module__", "") in ("_operator", "builtins", "math", "torch"):
        return
    raise NotNodeByNode(f"{node.format_node()}")


@functools.cache
def _core_table() -> Mapping[Any, Callable[..., Any]]:
    """Return the decompositions of the ops that are not CompositeImplicitAutograd.

    The whole of `default_decompositions` takes 0.1 s to list every composite op of PyTorch.
    """
    own = getattr(torch._decomp, "_core_aten_decompositions_post_autograd", None)
    found: Mapping[Any, Callable[..., Any]] = (
        own() if own is not None else torch.export.default_decompositions()
    )
    return found


@functools.cache
def _decomposition(op: OpOverload, kept: frozenset[str]) -> Callable[..., Any] | None:
    """Return an op's decomposition, a function of its arguments; None if the op is kept."""
    if str(op) in kept | _MISTAKEN or op.namespace == "prim":
        return None
    found = _core_table().get(op)
    if found is not None:
        return found
    preserved = getattr(import_module("torch.export.decomp_utils"), "PRESERVED_ATEN_CIA_OPS", ())
    if op in preserved or not torch._C._dispatch_has_kernel(op.name()):  # a size, in C++ code
        return None
    return op.decompose if op._can_decompose() else None


def table_without(kept: frozenset[str]) -> Any:
    """Return PyTorch's decomposition table for a trace of the whole, without kept and random ops.

    A random op that is decomposed (dropout, bernoulli) draws different numbers. Recurrent layers
    are tagged random for their dropout: under autocast they are decomposed as usual.
    """
    table: Any = torch.export.default_decompositions()
    whole = kept | _MISTAKEN
    for op in list(table):
        random = torch.Tag.nondeterministic_seeded in op.tags
        recurrent = {"num_layers", "batch_sizes"} & {a.name for a in op._schema.arguments}
        if str(op) in whole or (random and not recurrent):
            del table[op]
    return table


class _SizeNodes:
    """The graph's nodes that hold a size, by expression; missing ones are created."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.nodes: dict[sympy.Basic, fx.Node] = {}
        self._inputs = [n for n in graph.nodes if n.op == "placeholder"]

    def add(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            self.nodes.setdefault(expr(value), node)

    def find(self, value: torch.SymInt | torch.SymFloat) -> fx.Node | int | float:
        """Return a node with this value; it is created at the insertion point if there is none."""
        return self._find(expr(value))

    def _find(self, wanted: Any) -> Any:
        if wanted.is_Integer:
            return int(wanted)
        if wanted.is_number:
            return float(wanted)
        if wanted not in self.nodes:
            if wanted.is_Symbol:
                self._read(wanted)
            else:
                self.nodes[wanted] = self._compute(wanted)
        return self.nodes[wanted]

    def _compute(self, wanted: Any) -> fx.Node:
        """Create the nodes that compute an expression, as Python would."""
        kind, args = type(wanted).__name__, [self._find(a) for a in wanted.args]
        call: Any = _FOLDED.get(kind)
        if call is None and kind in FUNCTIONS:
            call = FUNCTIONS[kind].call
        if call is None:
            raise NotNodeByNode(f"{wanted} is not a function of sizes with a row in the table")
        if kind not in _FOLDED:
            return self._call(call, *args)
        return functools.reduce(functools.partial(self._call, call), args)

    def _call(self, call: Callable[..., Any], *args: Any) -> fx.Node:
        made = self.graph.call_function(call, args)
        made.meta["val"] = call(*fake(args))
        return made

    def _read(self, symbol: sympy.Basic) -> None:
        """Create a node for a symbol, which is the size of an input."""
        for node in self._inputs:
            fake = node.meta.get("val")
            for d, size in enumerate(fake.shape if isinstance(fake, torch.Tensor) else ()):
                if isinstance(size, torch.SymInt) and expr(size) == symbol:
                    made = self.graph.call_function(aten.sym_size.int, (node, d))
                    made.meta["val"] = size
                    self.nodes[symbol] = made
                    return
        raise NotNodeByNode(f"{symbol} is not the size of an input")


_FOLDED: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add, "Mul": operator.mul, "Pow": operator.pow,
    "Max": torch.sym_max, "Min": torch.sym_min,
}  # fmt: skip
"""Functions that take any number of arguments in sympy, and two in Python."""


class _Recorder(TorchDispatchMode):
    """Runs one composite node on fake tensors and records the ops that it calls in the graph,
    before it."""

    def __init__(self, node: fx.Node, sizes: _SizeNodes, kept: frozenset[str]) -> None:
        super().__init__()
        self.node, self.sizes, self.kept = node, sizes, kept
        self.known = {id(n.meta["val"]): n for n in node.all_input_nodes}
        self.alive: list[Any] = []  # keeps ids valid: an id may be reused once its owner dies
        self.made: list[fx.Node] = []
        self.has_turned = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.inplace_view in func.tags:
            return self._turn(func, args, kwargs)
        decomposition = _decomposition(func, self.kept)
        # A decomposed random op draws different numbers than eager mode.
        if decomposition is not None and not draws(func, args, kwargs):
            with self, inside(func):
                found = decomposition(*args, **kwargs)
            if found is not NotImplemented:
                return found
        if func in IDENTITIES:
            # A new tensor for the same node: a view that is its own base is an error.
            result = func(*args, **kwargs)
            self.known[id(result)] = self._argument(args[0])
            self.alive.append(result)
            return result
        if func._schema.is_mutable:
            return self._write(func, args, kwargs)
        result = func(*args, **kwargs)
        if not isinstance(result, (torch.Tensor, tuple, list)):
            return result  # a device or a size: its users find its value in the arguments
        given, named = pytree.tree_map(self._argument, (args, kwargs))
        self._record(self._append(func, given, named, result), result)
        return result

    def _write(self, func: OpOverload, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Record an in-place op on a tensor that the decomposition has made as the op that makes a
        new one: isclose adds conditions so. The tensor itself stands for the new one from then
        on."""
        changed, op = args[0], find_out_of_place(func)
        memory = memory_of(changed)
        given = [n.meta["val"] for n in self.node.all_input_nodes]
        held = [t for t in (*self.alive, *given) if isinstance(t, torch.Tensor)]
        shared = [t for t in held if memory_of(t) == memory]
        own = len(shared) == 1 and any(changed is t for t in self.alive)
        if op is not None and own and not draws(func, args, kwargs):
            made = self.__torch_dispatch__(op, (), args, kwargs)
            with suppress(UnknownError):
                if describe(made) == describe(changed):
                    self.known[id(changed)] = self._argument(made)
                    return changed
        raise NotNodeByNode(f"{self.node.format_node()} calls {func}")

    def _turn(self, func: OpOverload, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Record an in-place view change, to fewer dims: a pool removes the dim that it added. The
        tensor before the change stays the value of its node."""
        turned, self.has_turned = args[0], True
        if func is not aten.as_strided_.default or not any(turned is t for t in self.alive):
            raise NotNodeByNode(f"{self.node.format_node()} calls {func}")
        dense, source = turned.is_contiguous(), self.known[id(turned)]
        source.meta["val"] = aten.alias.default(turned)
        func(*args, **kwargs)
        if not (dense and turned.is_contiguous()):
            raise NotNodeByNode(f"{self.node.format_node()} calls {func}")
        sizes = pytree.tree_map(self._argument, list(args[1]))
        self._record(self._append(aten.view.default, (source, sizes), {}, turned), turned)
        return turned

    def _argument(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in self.known:
                raise NotNodeByNode(f"{self.node.format_node()} makes a constant")
            return self.known[id(value)]
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            return self.sizes.find(value)
        if isinstance(value, torch.SymBool):
            raise NotNodeByNode(f"{self.node.format_node()} computes with {value}")
        return value

    def _append(self, target: Any, args: Any, kwargs: Any, result: Any) -> fx.Node:
        name = getattr(getattr(target, "overloadpacket", target), "__name__", None)
        node = self.sizes.graph.create_node("call_function", target, args, kwargs, name=name)
        node.meta = meta_without_value(self.node)
        node.meta["val"] = result
        self.made.append(node)
        return node

    def _record(self, node: fx.Node, result: Any) -> None:
        self.alive.append(result)
        if isinstance(result, torch.Tensor):
            self.known[id(result)] = node
            return
        for k, part in enumerate(result):
            if isinstance(part, torch.Tensor):
                self.known[id(part)] = self._append(GETITEM, (node, k), {}, part)


_Results = tuple[fx.Node | None, ...]


@dataclass(frozen=True)
class _Known:
    """What a call was replaced by: its arguments' nodes, the new ones, those of its results."""

    given: tuple[fx.Node, ...]
    made: tuple[fx.Node, ...]
    found: _Results


def _replace(node: fx.Node, recorder: _Recorder, known: dict[Any, _Known]) -> None:
    """Replace a composite node by its decomposition. known: those of equal calls before it, which
    are copied."""
    given = node.all_input_nodes
    key = _describe(node)
    before = None if key is None else known.get(key)
    with node.graph.inserting_before(node):
        if before is not None:
            found = _copy(before, given, recorder)
        else:
            found = _decompose(node, recorder)
            if key is not None and not recorder.has_turned:
                known[key] = _Known(tuple(given), tuple(recorder.made), found)
    if isinstance(node.meta["val"], torch.Tensor):
        node.replace_all_uses_with(cast(fx.Node, found[0]))
    else:
        for user in list(node.users):
            if user.target is not operator.getitem:
                raise NotNodeByNode(f"{user.format_node()} takes several tensors as one")
            place: Any = user.args[1]
            if found[place] is None:
                raise NotNodeByNode(f"{node.format_node()} makes a constant")
            user.replace_all_uses_with(found[place])
            node.graph.erase_node(user)
    node.graph.erase_node(node)


def _describe(node: fx.Node) -> Any:
    """Return what the decomposition of a call depends on; None if that is not known."""
    places = {n: k for k, n in enumerate(node.all_input_nodes)}
    try:
        args, kwargs = (
            freeze(x, lambda n: (places[n], describe(n.meta["val"])))
            for x in (node.args, node.kwargs)
        )
        return node.target, args, kwargs
    except UnknownError:
        return None


def _copy(known: _Known, given: Sequence[fx.Node], recorder: _Recorder) -> _Results:
    """Append the nodes of an equal call's decomposition again; return those of its results."""
    pairs = zip(known.given, given, strict=True)
    copies: dict[fx.Node | None, fx.Node | None] = {a: b for a, b in pairs if is_tensor(a)}
    for old in known.made:  # sizes come before both
        args, kwargs = fx.node.map_arg((old.args, old.kwargs), lambda n: copies.get(n, n))
        value = proxy_tensor.extract_val(old.meta["val"])
        copies[old] = recorder._append(old.target, args, kwargs, value)
    return tuple(copies.get(n, n) for n in known.found)


def _decompose(node: fx.Node, recorder: _Recorder) -> _Results:
    """Run a composite call under a recorder; return the nodes of its results, None for what is no
    node."""
    target: Any = node.target
    decomposition = _decomposition(target, recorder.kept)
    assert decomposition is not None
    args, kwargs = fake((node.args, node.kwargs))
    mode = fake_mode_of((args, kwargs, node.meta["val"]))
    if mode is None:
        raise NotNodeByNode(f"{node.format_node()} has no fake tensor")
    with torch.no_grad(), enable_python_dispatcher(), mode, recorder, inside(target):
        result = decomposition(*args, **kwargs)
    if isinstance(result, torch.Tensor):
        return (recorder._argument(result),)
    if isinstance(result, (tuple, list)):
        return tuple(recorder.known.get(id(x)) for x in result)
    raise NotNodeByNode(f"{node.format_node()} gives {type(result).__name__}")
