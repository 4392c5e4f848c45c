"""`torch.compile(model, backend="turbotx")`: Dynamo's graphs, compiled by the same passes.

In: one graph of a model that needs graph breaks, and the inputs Dynamo traced it with. Out: a
callable that runs it for any sizes that Dynamo lets through, or in PyTorch with a warning why::

    fast = torch.compile(model.eval(), backend="turbotx", dynamic=True)
    turbotx.dynamo.graphs()     # what became of every graph
"""

from __future__ import annotations

import copy
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from turbotx.capture.ambient import read_ambient
from turbotx.capture.arguments import carry, flatten_call
from turbotx.capture.call_key import make_signature
from turbotx.capture.composition import LeftToPyTorch, left_to_pytorch
from turbotx.capture.decisions import Outcomes
from turbotx.engine.compiled import Compiled
from turbotx.engine.engine import Engine
from turbotx.engine.pipeline import build_ahead
from turbotx.errors import CaptureError, EagerWarning, InputError, TrainingError
from turbotx.options import Options, make_options
from turbotx.runtime.lru import LruDict

MAX_PARAMETER_SETS = 256
"""Modules of one class share a graph; each keeps packed weights, the longest unused one goes."""


@dataclass(frozen=True)
class GraphRecord:
    """What became of one of Dynamo's graphs.

    ops: how many calls it has. captures: how often turbotx had to trace it. parameter_sets: how
    many modules share it. eager: why it runs in PyTorch, "" where it does not.
    """

    ops: int
    captures: int
    parameter_sets: int
    eager: str


def compile_graph(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Return a callable for one graph: the backend that `torch.compile` calls.

    options: those of `turbotx.optimize`. Compilation happens at the first call, when there are real
    tensors. Raises OptionsError, InputError for a mode; calls raise TrainingError where gradients
    are needed.
    """
    if mode not in (None, "default"):
        raise InputError(f"mode={mode!r}: the backend turbotx has no modes; use options={{...}}")
    graph = _Graph(graph_module, example_inputs, make_options(**dict(options or {})))
    _graphs.append(weakref.ref(graph))
    return graph


_graphs: list[weakref.ref[_Graph]] = []


def graphs() -> list[GraphRecord]:
    """Return what became of every graph that is in use, in the order Dynamo made them."""
    alive = [found for ref in _graphs if (found := ref()) is not None]
    _graphs[:] = [weakref.ref(graph) for graph in alive]
    return [graph.record() for graph in alive]


def forget_graphs() -> None:
    """Leave the graphs made so far out of `graphs`, as after `torch._dynamo.reset()`."""
    _graphs.clear()


class _Graph:
    """One of Dynamo's graphs; its parameters are inputs to it, and the model's own to turbotx."""

    def __init__(
        self, graph_module: fx.GraphModule, examples: Sequence[Any], options: Options
    ) -> None:
        self.module, self.options = graph_module, options
        self.feed = _Feed.of(examples, _find_scalars(graph_module))
        self.traced = _take_numbers(graph_module, self.feed.scalars)
        self.eager = ""
        self.compiled: dict[Any, list[Compiled]] = {}
        self._engines: LruDict[Any, Engine] = LruDict(MAX_PARAMETER_SETS)
        self._lock = threading.RLock()

    def __call__(self, *inputs: Any) -> Any:
        if torch.is_grad_enabled():
            _refuse_gradients(self.module, inputs)
        if self.eager or left_to_pytorch():
            return self.module(*inputs)
        try:
            arguments = self.feed.arguments_of(inputs)
            engine = self._engine(self.feed.fixed_of(inputs))
            # Export cannot trace in inference mode, and parameters are no inference tensors.
            with torch.inference_mode(False), torch.no_grad():
                return engine(arguments, {})
        except LeftToPyTorch:
            return self.module(*inputs)
        except (CaptureError, InputError) as error:
            self._give_up(error)
            return self.module(*inputs)

    def _give_up(self, error: Exception) -> None:
        self.eager = str(error)
        first = self.eager.splitlines()[0]
        warnings.warn(
            f"torch.compile's graph of {_count_ops(self.module)} ops runs in PyTorch, not turbotx: "
            f"{first}",
            EagerWarning,
            stacklevel=3,
        )

    def _engine(self, fixed: Sequence[Any]) -> Engine:
        key = tuple(id(x) if isinstance(x, torch.Tensor) else x for x in fixed)
        with self._lock:
            engine = self._engines.find(key)
            if engine is None:
                engine = _SharingEngine(self, _Holder(self.traced, self.feed, fixed))
                self._engines[key] = engine
        return engine

    def record(self) -> GraphRecord:
        captures = sum(map(len, self.compiled.values()))
        return GraphRecord(_count_ops(self.module), captures, len(self._engines), self.eager)


@dataclass(frozen=True)
class _Feed:
    """How a graph's inputs become a module's: by position in what Dynamo passes.

    fixed: parameters and buffers; a module each. scalars: Python's numbers, which Dynamo wraps in
    tensors. dynamic: tensors. sizes: for each integer the tensor and the dim whose size it is;
    integers that are no tensor's size come as `carriers`, empty tensors of that size.
    """

    count: int
    fixed: tuple[int, ...]
    scalars: tuple[int, ...]
    dynamic: tuple[int, ...]
    sizes: Mapping[int, tuple[int, int]]
    carriers: tuple[int, ...]

    @classmethod
    def of(cls, examples: Sequence[Any], scalars: frozenset[int]) -> _Feed:
        tensors = [i for i, x in enumerate(examples) if isinstance(x, torch.Tensor)]
        fixed = tuple(i for i in tensors if i not in scalars and _is_static(examples[i]))
        dynamic = tuple(i for i in tensors if i not in fixed and i not in scalars)
        sizes: dict[int, tuple[int, int]] = {}
        for i, x in enumerate(examples):
            if isinstance(x, torch.SymInt):
                found = _find_size(x, [(k, examples[k]) for k in dynamic])
                if found is not None:
                    sizes[i] = found
        others = [i for i in range(len(examples)) if i not in tensors and i not in sizes]
        return cls(len(examples), fixed, tuple(sorted(scalars)), dynamic, sizes, tuple(others))

    def fixed_of(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the inputs that do not change between the calls of one module."""
        return [inputs[i] for i in self.fixed]

    def arguments_of(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Return the tensors and then the numbers to call the module with; raise InputError for
        what cannot be one."""
        made = []
        for i in self.carriers:
            value = inputs[i]
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise InputError(f"an input is {value!r}: neither a tensor nor a size")
            made.append(torch.empty(value, 0))
        numbers = (inputs[i].item() for i in self.scalars)
        return (*(inputs[i] for i in self.dynamic), *made, *numbers)

    def rebuild(self, fixed: Sequence[Any], given: Sequence[Any]) -> list[Any]:
        """Return the graph's own inputs again, sizes read from the tensors."""
        found: list[Any] = [None] * self.count
        for i, value in zip(self.fixed, fixed, strict=True):
            found[i] = value
        places = (*self.dynamic, *self.carriers, *self.scalars)
        for i, value in zip(places, given, strict=True):
            found[i] = value.shape[0] if i in self.carriers else value
        for i, (place, d) in self.sizes.items():
            found[i] = found[place].shape[d]
        return found


def _is_static(example: torch.Tensor) -> bool:
    """Tell a parameter or a buffer of a module, whose values do not change with the call."""
    marked = getattr(example, "_dynamo_static_input_type", None) is not None
    return marked or isinstance(example, nn.Parameter)


def _find_size(
    value: torch.SymInt, tensors: Sequence[tuple[int, torch.Tensor]]
) -> tuple[int, int] | None:
    for i, tensor in tensors:
        for d, size in enumerate(tensor.shape):
            if isinstance(size, torch.SymInt) and size.node.expr == value.node.expr:
                return i, d
    return None


def _find_scalars(graph_module: fx.GraphModule) -> frozenset[int]:
    """Return the places of the inputs that are numbers in tensors, read by `.item()` alone."""
    inputs = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    return frozenset(
        i
        for i, node in enumerate(inputs)
        if getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False)
        and all(u.op == "call_method" and u.target == "item" for u in node.users)
    )


def _take_numbers(graph_module: fx.GraphModule, scalars: Sequence[int]) -> fx.GraphModule:
    """Return the graph with those inputs as numbers."""
    if not scalars:
        return graph_module
    copied = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    inputs = [n for n in copied.graph.nodes if n.op == "placeholder"]
    for i in scalars:
        for read in list(inputs[i].users):
            read.replace_all_uses_with(inputs[i])
            copied.graph.erase_node(read)
    copied.recompile()
    return copied


class _Holder(nn.Module):
    """A graph as a module that owns its parameters."""

    def __init__(self, graph: nn.Module, feed: _Feed, fixed: Sequence[Any]) -> None:
        super().__init__()
        self.body, self.feed = graph, feed  # fx.GraphModule has no room for a child "graph"
        self.names = [f"fixed_{k}" for k in range(len(fixed))]
        for name, value in zip(self.names, fixed, strict=True):
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, torch.Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)
        self.training = False

    def forward(self, *given: Any) -> Any:
        fixed = [getattr(self, name) for name in self.names]
        return self.body(*self.feed.rebuild(fixed, given))


class _SharingEngine(Engine):
    """Runs a graph with one module's parameters; captures are shared by all of them."""

    guards_state = False  # Dynamo's own guards do

    def __init__(self, graph: _Graph, holder: _Holder) -> None:
        super().__init__(holder, graph.options)
        self._graph = weakref.ref(graph)

    def make(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], outcomes: Outcomes = ()
    ) -> Compiled:
        leaves, spec = flatten_call(args, kwargs)
        tensors = carry(leaves)
        graph = self._graph()
        assert graph is not None
        with graph._lock:
            ambient = read_ambient()
            known = graph.compiled.setdefault(make_signature(leaves, spec, ambient), [])
            for compiled in known:
                captured = compiled.captured
                if not captured.serves(ambient, tensors, outcomes):
                    continue
                if captured.matcher.match([t.shape for t in tensors]) is not None:
                    shared = build_ahead(self.bind(compiled.unbound.call))
                    if not shared.program.runtime.weights.misfit():
                        return shared
            made = super().make(args, kwargs, outcomes)
            known.append(made)
            return made


def _refuse_gradients(module: nn.Module, inputs: Sequence[Any]) -> None:
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    if any(t.requires_grad for t in (*tensors, *module.parameters())):
        raise TrainingError(
            "gradients are recorded, and the backend turbotx is for inference only: call the "
            "compiled module under torch.no_grad() or torch.inference_mode()"
        )


def _count_ops(module: fx.GraphModule) -> int:
    return sum(n.op in ("call_function", "call_method", "call_module") for n in module.graph.nodes)
