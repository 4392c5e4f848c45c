"""Equal layers: the code of a layer runs for two layers that are equal, and is copied for the rest.

In: a model under a trace, whose layers lie in module lists. Out: the same graph as a trace of every
layer gives; the nodes of a layer are copied where everything that they depend on is equal::

    48 layers of GPT-2: two are traced, 46 copied;  layers.reasons -> {"h.7": "scale differs", ...}

What a trace of a layer depends on: the tensors that it is given (dtypes, sizes, strides, which are
one and the same) and the other arguments; all that its code reads, which the guards of a call know;
PyTorch's own state; where it is called from. A layer is copied where two before it were equal in
all that, made the same nodes of their own tensors, and the second one left nothing behind.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental import proxy_tensor

from turbotx.capture.ambient import read_ambient
from turbotx.capture.equal_layers.copying import (
    LayerScope,
    bind,
    copy_nodes,
    inner_calls,
    is_inside,
    make_output,
    note_output,
)
from turbotx.capture.equal_layers.layer_call import CallArguments, encode, pattern_of
from turbotx.capture.equal_layers.layer_state import (
    LayerState,
    Read,
    Subtree,
    UnequalError,
    describe_places,
    describe_reads,
)
from turbotx.capture.inner_modes import told_modes
from turbotx.capture.module_state.names import Names
from turbotx.capture.module_state.recorder import StateRecorder
from turbotx.capture.module_state.values import dict_of
from turbotx.capture.tracing import replaced_in_thread
from turbotx.ir.memory_order import memory_of

MOST_KINDS = 6
"""Traced layers of one class that are not equal to each other; no more are compared."""


@dataclass(frozen=True)
class _Here:
    """All but a layer's own state that its trace depends on: PyTorch's, the code around it."""

    ambient: Any
    frames: tuple[Any, ...]
    arguments: Any


@dataclass
class KnownLayer:
    """A layer whose code has run: what it depended on, and what it did."""

    here: _Here
    reads: tuple[Read, ...]
    state: LayerState
    scope: LayerScope
    nodes: tuple[fx.Node, ...]
    roles: tuple[fx.Node, ...]
    encoded: Any
    output: Any
    calls: dict[str, int]
    rebound: dict[int, int]
    """The roles that are other nodes afterwards, by place, and which: `x.float()` of a float is
    x, and code that uses x after it uses that node."""
    named: LayerState | None = None
    """What lay at the places that the model's code names; None until another one was equal."""


@dataclass
class LayerCalls:
    """The calls of layers in a trace, by the layers' paths in the model: those whose code ran, and
    those that were copied; and why some were not."""

    traced: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)


class EqualLayers:
    """Stands between a tracer and a model's layers. calls: what it did in the latest trace."""

    names: Names

    def __init__(
        self, model: nn.Module, recorder: StateRecorder, look_around: Callable[[], Any]
    ) -> None:
        """look_around: gives what code under the trace may leave behind, as it is now; its first
        part is compared, the second one keeps alive what that tells by an id."""
        self.recorder, self.look_around = recorder, look_around
        self._layers = {id(dict_of(layer)): layer for layer in _find_layers(model)}
        self.begin()

    def begin(self) -> None:
        """Start anew, before the model's code runs; a trace may run it more than once."""
        self.known: dict[type, list[KnownLayer]] = {}
        self.calls = LayerCalls()

    def finish(self) -> None:
        """Release what the trace created, after the layer's code has ended."""
        self.known = {}

    def run(
        self, tracer: Any, module: Any, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Return the output of a module's call, by running its code or by copying the nodes of an
        equal layer. forward: calls the module, with its hooks."""
        layer = self._layers.get(id(dict_of(module)))
        entered = next(reversed(tracer.module_stack.values()), (None, None))[1]
        if layer is None or entered is not type(module):
            return forward(*args, **kwargs)
        call, like, before = None, None, None
        try:
            with self._apart():
                call = _Call(self, tracer, layer, args, kwargs)
                like, state = call.find_equal()
                if like is not None and state is not None:
                    return call.copy(like, state)
                before = call.look_around() if like is not None else None
        except UnequalError as error:
            self.calls.reasons[_path_in_model(LayerScope.of(tracer).path)] = str(error)
        if call is None or not call.is_compared:
            return forward(*args, **kwargs)
        output = call.trace(forward, args, kwargs)
        with self._apart():
            call.remember(output, like, before)
        return output

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Context manager: read the code's objects unseen by the recorder and PyTorch's modes."""
        with self.recorder.unnoted(), torch._C.DisableTorchFunction():
            yield


def _path_in_model(path: str) -> str:
    """Return a path without the names of what torch.export and turbotx have around the model."""
    return path.removeprefix("_export_root.").removeprefix("model.")


def _find_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules with submodules that are in a ModuleList, ModuleDict or Sequential."""
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            for child in module.children():
                if next(child.children(), None) is not None:
                    yield child


class _Call:
    """One call of a layer under a trace. Raises UnequalError where it is never to be copied."""

    def __init__(
        self, layers: EqualLayers, tracer: Any, layer: nn.Module, args: Any, kwargs: Any
    ) -> None:
        self._layers, self._recorder, self._tracer = layers, layers.recorder, tracer
        self.scope = LayerScope.of(tracer)
        self.path = _path_in_model(self.scope.path)
        self._subtree = Subtree(layer)
        arguments = CallArguments.of(args, kwargs, self._node_of)
        self._given = arguments.tensors
        tensors = (*self._given, *self._subtree.tensors())
        self._nodes = {id(t): self._node_of(t) for t in tensors}  # before the code has run
        described = arguments.described, pattern_of([self._nodes[id(t)] for t in self._given])
        self._here = _Here((read_ambient(), told_modes()), _frames(), described)
        self._known = layers.known.setdefault(type(self._recorder.find_own(layer)), [])
        self.is_compared = True

    def _node_of(self, tensor: torch.Tensor) -> fx.Node:
        found = self._tracer.tensor_tracker.get(tensor)
        if found is None or found.constant is not None:
            raise UnequalError("it has to do with a tensor that is a constant")
        node: fx.Node = found.proxy.node
        return node

    def _describe(self, reads: Sequence[Read]) -> LayerState:
        return describe_reads(reads, self._subtree, self._recorder.find_own)

    def _roles(self, state: LayerState) -> tuple[fx.Node, ...]:
        tensors = (*self._given, *state.tensors)
        if not all(id(t) in self._nodes for t in tensors):
            raise UnequalError("a tensor in it was exchanged meanwhile")
        return tuple(self._nodes[id(t)] for t in tensors)

    def look_around(self) -> tuple[Any, Any, Any]:
        """Return what the layer's code may change beside its own tensors, as it is now: to compare,
        what lies at the places that the model's code names, and what keeps both alive."""
        named = describe_places(self._layers.names.places.values())
        compared, kept = self._layers.look_around()
        environments = (t.fake_mode.shape_env for t in self._given)
        guards = [(len(e.guards), len(e.replacements)) for e in environments if e is not None]
        return (named.described, compared, guards), named, kept

    # --- before ---

    def find_equal(self) -> tuple[KnownLayer | None, LayerState | None]:
        """Return a traced layer that this one is equal to; where it is known to leave nothing
        behind, also this one's state, so that it is to be copied."""
        why = ""
        for traced in reversed(self._known):
            state, reason = self._compare(traced)
            if state is None:
                why = why or reason
                continue
            if traced.named is None:
                return traced, None
            named = describe_places(self._layers.names.places.values())
            if named.described == traced.named.described:
                return traced, state
            why = why or "what its code names has changed meanwhile"
        if why:
            self._layers.calls.reasons[self.path] = why
        self.is_compared = len(self._known) < MOST_KINDS
        return None, None

    def _compare(self, traced: KnownLayer) -> tuple[LayerState | None, str]:
        """Return this layer's state at the places that a traced one has read, where it is equal,
        or else why it is not."""
        if traced.here.arguments != self._here.arguments:
            return None, "its arguments are of another kind"
        if traced.here != self._here:
            return None, "it is called in another place or state"
        try:
            state = self._describe(traced.reads)
            roles = self._roles(state)
        except UnequalError as error:
            return None, str(error)
        if state.described != traced.state.described:
            pairs = zip(traced.reads, traced.state.described, state.described, strict=True)
            read = next(r for r, was, now in pairs if was != now)
            return None, f"{read.path or ''}.{read.name}".lstrip(".") + " differs"
        if pattern_of(roles) != pattern_of(traced.roles):
            return None, "other tensors of it are one and the same"
        return state, ""

    # --- a copy ---

    def copy(self, like: KnownLayer, state: LayerState) -> Any:
        """Make the nodes of an equal layer once more, and note what its code would have read."""
        for read in like.reads:
            owner = read.owner if read.path is None else self._subtree.modules[read.path]
            self._recorder.note_read(owner, read.name)
        known = dict(zip(like.roles, self._roles(state), strict=True))
        tracer, scope = self._tracer, self.scope
        nodes = copy_nodes(like.nodes, tracer, known, like.scope, scope)
        for place, k in like.rebound.items():
            bind((*self._given, *state.tensors)[place], nodes[k], tracer)
        for inner, count in like.calls.items():
            path = f"{scope.path}{inner}"
            tracer.num_calls[path] = tracer.num_calls.get(path, 0) + count
        self._layers.calls.copied.append(self.path)
        return make_output(like.output, nodes, tracer, self._given)

    # --- a trace ---

    def trace(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the layer's code, and note what it reads and makes."""
        self._noted: dict[Any, tuple[Any, str]] = {}
        self._last = self._tracer.graph._root.prev
        self._questions = len(self._recorder.gradients)
        self._recorder.open_reads.append(self._noted)
        try:
            output = forward(*args, **kwargs)
        finally:
            self._recorder.open_reads.pop()
        self._layers.calls.traced.append(self.path)
        return output

    def remember(self, output: Any, like: KnownLayer | None, before: Any) -> None:
        """Keep what the code did, and whether a layer like it did the same."""
        try:
            traced = self._note(output)
            if like is not None:
                self._known.remove(like)
                after = self.look_around()
                if after[0] != before[0]:
                    raise UnequalError("its code leaves something behind")
                if why := _find_difference(traced, like):
                    self._layers.calls.reasons[self.path] = why
                else:
                    traced.named = after[1]
            self._known.append(traced)
        except UnequalError as error:
            self._layers.calls.reasons[self.path] = str(error)

    def _note(self, output: Any) -> KnownLayer:
        if len(self._recorder.gradients) != self._questions:
            raise UnequalError("its code asks which parameters require gradients")
        nodes = tuple(_after(self._last, self._tracer.graph))
        if not all(is_inside(n, self.scope) for n in nodes):
            raise UnequalError("its code calls a module that is not inside of it")
        reads = self._subtree.to_reads(self._noted.values())
        state = self._describe(reads)
        roles = self._roles(state)
        after = inner_calls(self._tracer, self.scope.path)
        calls = {p: n - self.scope.calls.get(p, 0) for p, n in after.items()}
        returned = note_output(output, nodes, self._node_of, self._given)
        places = {node: k for k, node in enumerate(nodes)}
        now = map(self._node_of, (*self._given, *state.tensors))
        pairs = enumerate(zip(roles, now, strict=True))
        rebound = {k: places[node] for k, (role, node) in pairs if role is not node}
        memories = {memory_of(t) for t in (*self._given, *state.tensors)}
        encoded = encode(nodes, roles, memories)
        return KnownLayer(
            self._here, reads, state, self.scope, nodes, roles, encoded, returned, calls, rebound
        )


def _find_difference(traced: KnownLayer, like: KnownLayer) -> str:
    """Return what two layers that were equal before did differently; "" if nothing."""
    if [r.key for r in traced.reads] != [r.key for r in like.reads]:
        return "its code reads other attributes than that of an equal layer"
    if traced.state.described != like.state.described:
        return "its code changes what it reads"
    did = (traced.encoded, traced.output, traced.rebound)
    if did != (like.encoded, like.output, like.rebound):
        return "its code does something else than that of an equal layer"
    return ""


def _after(last: fx.Node, graph: fx.Graph) -> Iterator[fx.Node]:
    node = last.next
    while node is not graph._root:
        yield node
        node = node.next


def _frames() -> tuple[Any, ...]:
    """Return where in the code the layer is called from."""
    found: list[Any] = []
    frame: Any = sys._getframe(1)
    while frame is not None:
        found.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(found)


@contextmanager
def copying_layers(layers: EqualLayers) -> Iterator[None]:
    """Context manager: copy the nodes of equal layers in this thread's exports."""
    tracer: Any = getattr(proxy_tensor, "_ModuleStackTracer", None)  # of PyTorch 2.11 to 2.13
    if tracer is None:
        yield
        return
    call_module = tracer.call_module

    def call(self: Any, module: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            return layers.run(self, module, forward, args, kwargs)

        return call_module(self, module, run, args, kwargs)

    with replaced_in_thread(tracer, "call_module", call):
        yield
