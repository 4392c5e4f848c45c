"""Where: what became of an op of the model, and which launches run an op of the rewritten graph.

In: a report and the name of a node. Out: its `NodeEntry`. Most ops keep their names; a packed GEMM
is found by its parameters, an op that a pass replaced by its source line::

    find_place(report, "linear_1")  ->  Place(status="gemm", launches=("linear_0",), ...)
"""

from __future__ import annotations

from typing import Any

from torch import fx

from turbotx import ir
from turbotx.errors import InputError
from turbotx.ir import fx_nodes as g
from turbotx.passes.partition import GEMMS, kind_of, op_name, root_of, tensor_inputs
from turbotx.report.describe import parameters_of
from turbotx.report.entries import NodeEntry
from turbotx.report.origin import Node
from turbotx.report.record import Record

GEMM_NAMES = frozenset(str(target) for target in GEMMS)


class _Index:
    """Launches by the nodes that they compute."""

    def __init__(self, report: Record) -> None:
        compiled = report.compiled
        self.report = report
        self.nodes = {n.name: n for n in compiled.graph.nodes}
        self.origin = {n.name: n for n in report.origin.nodes}
        self.hoisted, constants = compiled.hoisted, compiled.assembly.hoisted
        self.of_node: dict[str, list[ir.Launch]] = {}
        self.of_parameter: dict[str, list[ir.Launch]] = {}
        for x in compiled.assembly.launches:
            for name in _computed(x):
                self.of_node.setdefault(name, []).append(x)
            if isinstance(x, (ir.GemmLaunch, ir.GroupedGemmLaunch)):
                weight = x.weight.tensor
                for name in parameters_of(constants.get(weight) or self.nodes[weight]):
                    self.of_parameter.setdefault(name, []).append(x)
        self.by_line: dict[tuple[str, str], list[fx.Node]] = {}
        for n in compiled.graph.nodes:
            if n.op == "call_function" and n.name not in self.origin and g.place_of(n):
                self.by_line.setdefault((g.module_of(n), g.place_of(n)), []).append(n)


def _computed(launch: ir.Launch) -> list[str]:
    """Return the nodes that a launch computes; for a kernel, those that its outputs depend on."""
    if isinstance(launch, ir.KernelLaunch):
        roles = zip(launch.nodes, launch.kernel.params, strict=True)
        outputs = [node for node, param in roles if param.role == "out"]
        given = {n for n in launch.nodes if n not in outputs}
        return _needed(outputs, given)
    return list(dict.fromkeys([*launch.source.split(", "), *launch.writes]))


def _needed(outputs: list[fx.Node], given: set[fx.Node]) -> list[str]:
    found: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        root = root_of(node)
        if root in found or root in given or root.op != "call_function":
            return
        found[root] = None
        for source in tensor_inputs(root):
            visit(source)

    for node in outputs:
        visit(node)
    return [n.name for n in found]


def find_place(report: Record, node: str | fx.Node) -> NodeEntry:
    """Return the entry of a node of the captured or of the rewritten graph, or of its name.

    Raises InputError for a name in neither.
    """
    name = node.meta.get("rewritten", node.name) if isinstance(node, fx.Node) else node
    index: Any = report.__dict__.get("_where")
    if index is None:
        index = report.__dict__["_where"] = _Index(report)
    now, before = index.nodes.get(name), index.origin.get(name)
    region = next((r for r in report.regions if r.name == name), None)
    if region is not None:
        module, source = (values[0] if values else "" for values in (region.modules, region.places))
        return NodeEntry(name, "region", module, source, "fused", region.launches, region.kernels)
    if now is None and before is None:
        raise InputError(
            f"no op is called {name!r}: names are those of report.graph and of captured.txt"
        )
    if now is not None:
        return _place_now(index, now)
    return _place_before(index, before)


def _make(index: _Index, name: str, status: str, like: Any, launches: list[ir.Launch]) -> NodeEntry:
    report = index.report
    if isinstance(like, Node):
        op, module, source = like.op, like.module, like.place
    else:
        op = op_name(like) if like.op == "call_function" else like.op
        module, source = g.module_of(like), g.place_of(like)
    kernels = dict.fromkeys(report.view.function_of(x) for x in launches)
    return NodeEntry(name, op, module, source, status, tuple(x.name for x in launches),
                 tuple(k for k in kernels if k))  # fmt: skip


def _place_now(index: _Index, node: fx.Node) -> NodeEntry:
    kind = kind_of(node, index.hoisted)
    launches = index.of_node.get(node.name, [])
    status = {"computed": "fused", "extern": "aten", "piece": "aten", "size": "removed"}
    if any(isinstance(x, ir.RouteLaunch) for x in launches):
        status["piece"] = "route"
    if kind == "view" and not launches:
        readers = [index.of_node.get(u.name, []) for u in _readers(node)]
        launches = list({x.name: x for found in readers for x in found}.values())
    shown = status.get(kind, kind)
    copied = kind == "view" and node.name in index.of_node  # a launch copies it
    if copied or (
        kind in ("gemm", "attention", "product")
        and any(isinstance(x, ir.AtenLaunch) for x in launches)
    ):
        shown = "aten"
    if kind == "computed" and not launches:
        shown = "removed"
    return _make(index, node.name, shown, node, launches)


def _readers(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    for user in node.users:
        found += _readers(user) if root_of(user) is not user else [user]
    return found


def _place_before(index: _Index, node: Node) -> NodeEntry:
    """Find a node that a pass removed: by its parameters, or by the nodes that replaced its source
    line."""
    if node.target in GEMM_NAMES:
        parameters = [index.origin[n].target for n in node.inputs if n in index.origin]
        for parameter in parameters:
            if parameter in index.of_parameter:
                return _make(index, node.name, "gemm", node, index.of_parameter[parameter][:1])
    replaced = index.by_line.get((node.module, node.place), []) if node.place else []
    found = {x.name: x for n in replaced for x in index.of_node.get(n.name, [])}
    launches = list(found.values())
    if launches:
        return _make(index, node.name, "merged", node, launches)
    return _make(index, node.name, "removed", node, [])
