"""Capture: a module and one call's inputs become an fx graph of ATen ops with symbolic sizes.

In: an nn.Module and example args/kwargs. Out: a `Captured` whose graph reads parameters by
their own names (`get_attr`), takes the call's tensors as placeholders, and whose every size is
an expression over named dims; the first call's size-1 dims are symbolic too. Example::

    captured = capture(bert, (), {"input_ids": ids, "attention_mask": mask})
    captured.dims  ->  ("batch", "seq", "attention_mask_d0")
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.export import Dim
from torch.nn.attention import SDPBackend, sdpa_kernel

from turbotx.ambient import Ambient, no_autocast_cache, read_ambient, watch_reads, without_autocast
from turbotx.arguments import (
    Structure,
    carry,
    changed_arguments,
    flatten_call,
    is_float,
    rebuild,
)
from turbotx.casts import write_casts
from turbotx.composition import calls_forward
from turbotx.decompose import NotNodeByNode, decompose_nodes
from turbotx.eager import ASKED, ORDER, note_layouts
from turbotx.errors import CaptureError
from turbotx.graph import remember_names
from turbotx.guards import (
    Guard,
    find_equals,
    find_guards,
    find_squeezed,
    guard_sizes,
    guard_squeezed,
)
from turbotx.input_names import find_hints, name_dims, name_inputs
from turbotx.layout_questions import LayoutQuestions
from turbotx.memory_order import by_order, in_memory, inverse, make_dense, memory_order, moved_dims
from turbotx.module_state.record import StateRecord, make_record, start_recording
from turbotx.module_state.recorder import Recorder
from turbotx.quiet import quiet_torch
from turbotx.refusals import refuse_mutation, refuse_parts
from turbotx.returned import put_constants, take_apart
from turbotx.size_questions import sizes_from_one
from turbotx.size_tensors import SizeTensors
from turbotx.sizes import Expr, expr
from turbotx.tensor_indices import TensorIndices
from turbotx.trace_errors import Stopped, capture_error
from turbotx.traced_float import FloatInput, FloatReads, read_floats
from turbotx.unlift import FRESH, unlift
from turbotx.widen import Places, widen

# The key, in the exported graph's meta, of the sizes that a squeeze looks at.
SQUEEZED = "squeezed"
# Composite ops that stay whole: the passes and the op table know them as they are, and their
# decompositions only hide what they mean.
KEPT_WHOLE = frozenset(
    (
        "aten.scaled_dot_product_attention.default",
        "aten.linear.default",
        "aten.layer_norm.default",
        "aten.rms_norm.default",
        "aten.group_norm.default",
        "aten.softmax.int",
        "aten.log_softmax.int",
        "aten.matmul.default",
    )
)


@dataclass(frozen=True)
class Captured:
    """One traced call: the graph, how to feed it and how to rebuild the model's own output.

    ambient: the state of PyTorch that it was traced in. asked: the places in it that Python code
    asked for, beside those that decide every trace.
    """

    graph_module: fx.GraphModule
    name: str
    input_names: tuple[str, ...]
    input_sizes: tuple[tuple[Expr, ...], ...]
    dims: tuple[str, ...]
    example_dims: tuple[int, ...]
    guards: tuple[Guard, ...]
    out_spec: pytree.TreeSpec
    ambient: Ambient
    asked: tuple[int, ...]

    floats: tuple[FloatInput, ...] = ()
    state: StateRecord | None = None

    def takes(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Tell whether the floats that its Python code asked for are as they were."""
        return all(x.takes(tensors) for x in self.floats)

    def holds_in(self, ambient: Ambient) -> bool:
        """Tell whether what its Python code asked PyTorch for is as it was."""
        return all(ambient[k] == self.ambient[k] for k in self.asked)


class _Seen:
    """What tracing saw; an object of its own because tracing undoes changes to a module."""

    out_spec: pytree.TreeSpec
    constants: dict[int, Any]


class _Flat(nn.Module):
    """The model behind a flat signature: tensors in, by their order in memory, leaves out."""

    def __init__(
        self, model: nn.Module, leaves: Sequence[Any], spec: Structure, recorder: Recorder
    ) -> None:
        super().__init__()
        self.model, self.recorder = model, recorder
        self.calls_forward = calls_forward(model)
        self.constants = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.positions = [
            i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) or is_float(x)
        ]
        carried = (leaves[i] for i in self.positions)
        self.orders = [memory_order(x) if isinstance(x, torch.Tensor) else None for x in carried]
        self.floats = FloatReads()
        self.layouts = LayoutQuestions()
        self.in_spec = spec
        self.seen = _Seen()
        self.training = False

    def forward(self, *tensors: torch.Tensor) -> list[Any]:
        leaves = list(self.constants)
        self.floats.begin()
        self.layouts.begin(tensors)
        given = zip(self.positions, tensors, self.orders, strict=True)
        for k, (position, tensor, order) in enumerate(given):
            number = leaves[position]
            if number is None:
                leaves[position] = in_memory(tensor, inverse(order))
            else:
                leaves[position] = self.floats.make(number, tensor, k)
        args, kwargs = rebuild(leaves, self.in_spec)
        model, name = self.model, type(self.model).__name__
        try:
            with self.recorder.on(tensors), TensorIndices(), self.layouts:
                # Hooks of the model itself are left out: they run around the program.
                called = model.forward if self.calls_forward else model
                output = called(*args, **kwargs)
            _refuse_changes(changed_arguments(args, kwargs, leaves, self.in_spec, output))
            flat, self.seen.out_spec, self.seen.constants = take_apart(output, name)
        except Exception as error:
            raise Stopped(error) from error
        return [read_floats(leaf) for leaf in flat]

    def describe_floats(self) -> tuple[FloatInput, ...]:
        """Return every float of the call, with what the trace took for granted of it."""
        numbers = [(k, self.constants[i]) for k, i in enumerate(self.positions)]
        return tuple(self.floats.describe(k, x) for k, x in numbers if x is not None)


def _refuse_changes(changed: Sequence[str]) -> None:
    if changed:
        raise CaptureError(
            f"it changes its argument {', '.join(changed)} (an attribute, an entry or an item), "
            "which a program cannot do for the caller: return the new value instead"
        )


def capture(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], least: int = 2,
    fixed: Places = (),
) -> Captured:  # fmt: skip
    """Trace `model(*args, **kwargs)` with every size of every tensor symbolic, less those of 0.

    least: sizes of 1 and 2 are traced as this size. fixed: dims whose sizes are to be numbers, the
    call's own.
    Raises CaptureError, naming the user's own source line, when the model cannot be traced.
    """
    refuse_parts(model)
    leaves, spec = flatten_call(args, kwargs)
    tensors = carry(leaves)
    names = name_inputs(model, args, kwargs)
    recorder, code_names = start_recording(model)
    flat = _Flat(model, leaves, spec, recorder)
    name = type(model).__name__
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise CaptureError(f"cannot capture {name}: the call has no tensor among its arguments")
    ambient = read_ambient()
    with (
        _left_as_it_was(model), recorder.installed(), no_autocast_cache(),
        watch_reads(ambient) as asked, quiet_torch(),
    ):  # fmt: skip
        try:
            exported = _export_widened(flat, tensors, least, fixed, name)
        except CaptureError:
            if not flat.describe_floats():
                raise
            flat.floats.fixed = True  # an op or a class took no stand-in for a number
            exported = _export_widened(flat, tensors, least, fixed, name)
    with without_autocast():
        captured = _describe(exported, flat, name, names, ambient, tuple(sorted(asked)))
    return replace(captured, state=make_record(model, recorder, code_names))


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Undo what a trace leaves in a model that keeps something of a call, a cached mask for one:
    its sizes are symbols, and the model's own later calls would meet them."""
    before = [(m, dict(vars(m)), dict(m._buffers)) for m in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def _export_widened(
    flat: _Flat, tensors: Sequence[torch.Tensor], least: int, fixed: Places, name: str
) -> Any:
    """Trace with as many dims symbolic as the call takes; raise the first attempt's error.

    A size of 1 varies unless a larger one stands beside it, counted from the left, or else from
    either side. Where that fails too it is taken for a broadcast (the call may have moved the dims)
    or for a number that the call spells out too.
    """
    first, tried = None, []
    tensors = [t.resolve_conj().resolve_neg() for t in tensors]
    for sides in ("left", "both", "none"):
        examples, varying = widen(tensors, least, fixed, sides)
        examples = list(map(make_dense, examples, flat.orders))
        varying = list(map(moved_dims, varying, flat.orders))
        if varying in tried:
            continue
        tried.append(varying)
        for attention in _attentions(tensors):
            try:
                with attention():
                    return _export(flat, examples, varying)
            except Exception as error:
                error = error.error if isinstance(error, Stopped) else error
                if str(error).startswith("cannot capture"):  # no other sizes would help
                    raise error from None
                first = first or error
    assert first is not None
    raise capture_error(name, first) from first


def _attentions(
    tensors: Sequence[torch.Tensor],
) -> Sequence[Callable[[], AbstractContextManager[object]]]:
    """Return how PyTorch may choose attention's kernel meanwhile, in the order to be tried.

    The graph holds attention whole, but tracing follows the choice inside. On CUDA the
    memory-efficient one asks whether the mask's length is a multiple of 16, which would be a guard
    on seq; the plain one asks nothing. A model that cannot be traced so, because it views the
    result as the fused ones lay it out, is traced by the device's own choice.
    """
    return (_plain_attention, nullcontext) if any(t.is_cuda for t in tensors) else (nullcontext,)


@contextmanager
def _plain_attention() -> Iterator[None]:
    # The choice is the process's: restored out of order, it would stay as another thread made it.
    with _choosing_attention, sdpa_kernel(SDPBackend.MATH):
        yield


_choosing_attention = threading.RLock()


def _export(flat: _Flat, examples: list[torch.Tensor], varying: list[list[int]]) -> Any:
    """Trace with the `varying` dims of each example symbolic, down to the ops that are kept."""
    dynamic = (tuple(dict.fromkeys(dims, Dim.AUTO) or None for dims in varying),)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with SizeTensors(), sizes_from_one():
            exported = torch.export.export(
                flat, tuple(examples), dynamic_shapes=dynamic, strict=False
            )
        write_casts(exported.graph)
        before, fresh = copy.deepcopy(exported.graph), _fresh_constants(exported)
        squeezed = find_squeezed(exported.graph)
        try:
            decompose_nodes(exported.graph_module, KEPT_WHOLE)
        except NotNodeByNode:
            exported.graph_module.graph = before
            exported = exported.run_decompositions(_decompositions())
    exported.graph_module.meta |= {FRESH: fresh, SQUEEZED: squeezed}
    return exported


def _fresh_constants(exported: Any) -> set[str]:
    """Return the constants that only tracing made, of torch.tensor(0.5) in the model's code: the
    user has no name by which to change one later."""
    targets = {s.arg.name: s.target for s in exported.graph_signature.input_specs if s.target}
    lift = torch.ops.aten.lift_fresh_copy.default
    nodes = [n for n in exported.graph_module.graph.nodes if n.name in targets]
    return {targets[n.name] for n in nodes if all(u.target is lift for u in n.users)}


def _decompositions() -> Any:
    table = torch.export.default_decompositions()
    for op in list(table):
        if str(op) in KEPT_WHOLE:
            del table[op]
    return table


def _describe(
    exported: Any,
    flat: _Flat,
    name: str,
    names: list[str],
    ambient: Ambient,
    asked: tuple[int, ...],
) -> Captured:
    refuse_mutation(exported, name)
    graph_module, inputs = unlift(exported, flat, names)
    put_constants(graph_module.graph, flat.seen.constants)
    fakes = [node.meta["val"] for node in inputs]
    shapes = [by_order(f.shape, inverse(o)) for f, o in zip(fakes, flat.orders, strict=True)]
    for k, (node, order) in enumerate(zip(inputs, flat.orders, strict=True)):
        node.meta |= {ORDER: order, ASKED: k in flat.layouts.asked}
    shape_env = next((f.fake_mode.shape_env for f in fakes if f.fake_mode.shape_env), None)
    symbols = name_dims(shapes, names, find_equals(shape_env))
    remember_names(graph_module, symbols)
    note_layouts(graph_module.graph)
    squeezed = exported.graph_module.meta[SQUEEZED]
    guards = find_guards(exported, shape_env, symbols) + guard_sizes(graph_module, symbols)
    guards += guard_squeezed(squeezed, symbols)
    sizes = tuple(tuple(expr(s).xreplace(symbols) for s in shape) for shape in shapes)
    dims = tuple(dict.fromkeys(s.name for s in symbols.values()))
    hints = find_hints(shape_env, symbols)
    return Captured(
        graph_module, name, tuple(node.name for node in inputs), sizes, dims, hints, guards,
        flat.seen.out_spec, ambient, asked, flat.describe_floats(),
    )  # fmt: skip
