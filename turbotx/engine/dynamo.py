"""`torch.compile(model, backend="turbotx")`: Dynamo's graphs, compiled by the same passes.

In: one graph of a model with graph breaks, and the example inputs from Dynamo. Out: a callable that
runs the graph for any sizes that Dynamo's guards admit, or runs it in PyTorch with a warning that
says why::

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
from turbotx.errors import CaptureError, EagerWarning, InputError, OptionsError, TrainingError
from turbotx.options import Options, make_options
from turbotx.runtime.lru import LruDict

MAX_PARAMETER_SETS = 256
"""Modules of one class share a graph; each has its own packed weights, evicted by LRU beyond
this."""


@dataclass(frozen=True)
class GraphRecord:
    """What became of one of Dynamo's graphs.

    ops: number of calls in the graph.
    captures: how often turbotx traced it.
    parameter_sets: number of modules that share it.
    eager: why it runs in PyTorch, "" if it does not.
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

    options: those of `turbotx.optimize`. The graph is compiled at the first call, when real tensors
    are available. Raises OptionsError, also for keep_weights=False; InputError for a mode; calls
    raise TrainingError if gradients are needed.
    """
    if mode not in (None, "default"):
        raise InputError(f"mode={mode!r}: the backend turbotx has no modes; use options={{...}}")
    chosen = make_options(**dict(options or {}))
    if not chosen.keep_weights:
        raise OptionsError(
            "keep_weights=False gives no memory back under torch.compile, whose graphs take the "
            "parameters as inputs and hold them: leave it out, or use turbotx.optimize"
        )
    graph = _Graph(graph_module, example_inputs, chosen)
    _graphs.append(weakref.ref(graph))
    return graph


_graphs: list[weakref.ref[_Graph]] = []


def graphs() -> list[GraphRecord]:
    """Return what became of every graph in use, in the order in which Dynamo made them."""
    alive = [found for ref in _graphs if (found := ref()) is not None]
    _graphs[:] = [weakref.ref(graph) for graph in alive]
    return [graph.record() for graph in alive]


def forget_graphs() -> None:
    """Remove all graphs made so far from `graphs()`, as after `torch._dynamo.reset()`."""
    _graphs.clear()


class _Graph:
    """One of Dynamo's graphs. Its inputs include the parameters, which turbotx treats as the
    model's."""

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
            # Export cannot trace in inference mode, and parameters are not inference tensors.
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
    """How a graph's inputs map to a module's; all fields are positions in Dynamo's inputs.

    fixed: parameters and buffers; one module per set of them.
    scalars: Python numbers, which Dynamo wraps in tensors.
    dynamic: tensors.
    sizes: for each integer, the tensor and dim whose size it is.
    carriers: integers that are not the size of any tensor; passed as empty tensors of that size.
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
        """Return the inputs that are the same in all calls of one module."""
        return [inputs[i] for i in self.fixed]

    def arguments_of(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Return the module's arguments, tensors before numbers; raise InputError for an input that
        is neither a tensor nor a size."""
        made = []
        for i in self.carriers:
            value = inputs[i]
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise InputError(f"an input is {value!r}: neither a tensor nor a size")
            made.append(torch.empty(value, 0))
        numbers = (inputs[i].item() for i in self.scalars)
        return (*(inputs[i] for i in self.dynamic), *made, *numbers)

    def rebuild(self, fixed: Sequence[Any], given: Sequence[Any]) -> list[Any]:
        """Return the graph's own inputs, with sizes read from the tensors."""
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
    """Return whether an example is a parameter or buffer of a module."""
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
    """Return the positions of inputs that are numbers in tensors, read only by `.item()`."""
    inputs = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    return frozenset(
        i
        for i, node in enumerate(inputs)
        if getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False)
        and all(u.op == "call_method" and u.target == "item" for u in node.users)
    )


def _take_numbers(graph_module: fx.GraphModule, scalars: Sequence[int]) -> fx.GraphModule:
    """Return the graph with those inputs as plain numbers."""
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
        self.body, self.feed = graph, feed  # fx.GraphModule reserves the name "graph"
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
    """Runs a graph with one module's parameters; captures are shared between modules."""

    guards_state = False  # Dynamo has its own guards

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
