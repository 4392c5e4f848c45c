"""Capture: traces a module and one call's inputs to an fx graph of ATen ops with symbolic sizes.

In: an nn.Module and example args/kwargs. Out: a `Captured` whose graph reads parameters by their
own names (`get_attr`) and takes the call's tensors as placeholders. Every size is an expression
over named dims, also where the first call's size is 1. Example::

    captured = capture(bert, (), {"input_ids": ids, "attention_mask": mask})
    captured.dims  ->  ("batch", "seq", "attention_mask_d0")
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.export import Dim

from turbotx.capture.ambient import (
    Ambient,
    no_autocast_cache,
    read_ambient,
    watch_reads,
    without_autocast,
)
from turbotx.capture.arguments import Structure, carry, flatten_call
from turbotx.capture.attention_kernels import attention_kernels
from turbotx.capture.casts import write_casts
from turbotx.capture.decisions import Decisions, Outcomes
from turbotx.capture.decompose import NotNodeByNode, decompose_nodes, table_without
from turbotx.capture.encoder_padding import padding_as_eager
from turbotx.capture.equal_layers.layers import LayerCalls, copying_layers
from turbotx.capture.expanded_inputs import ExpandedInputs, find_decisive
from turbotx.capture.fake_mode import remembering_fakes
from turbotx.capture.flat_call import FlatCall
from turbotx.capture.guards import (
    Guard,
    Written,
    find_equals,
    find_guards,
    find_replaced,
    find_squeezed,
    find_written,
    guard_asked,
    guard_sizes,
    guard_squeezed,
    guard_written,
)
from turbotx.capture.host_random import (
    find_draws,
    look_at_generators,
    refuse_seeding,
    watch_entropy,
)
from turbotx.capture.idle_conversions import idle_conversions
from turbotx.capture.idle_dropout import IdleDropout
from turbotx.capture.inplace_ops import write_out_of_place
from turbotx.capture.input_names import find_hints, name_dims, name_inputs
from turbotx.capture.light_export import light_decomposition, light_export
from turbotx.capture.module_state.environment import watch_environment
from turbotx.capture.module_state.identity import equal_to
from turbotx.capture.module_state.record import StateRecord, find_model_names, make_record
from turbotx.capture.module_state.recorder import StateRecorder
from turbotx.capture.module_state.unfollowed import Unfollowed
from turbotx.capture.quiet import quiet_torch
from turbotx.capture.recurrent_layers import recurrent_layers_whole, recurrent_ops
from turbotx.capture.refusals import refuse_mutation, refuse_parts
from turbotx.capture.result_layouts import ASKED, ORDER, Steps, find_shown, note_layouts
from turbotx.capture.returned import put_constants
from turbotx.capture.returned_arguments import ReturnedContainer
from turbotx.capture.sandbox.effects import Effect
from turbotx.capture.shape_matcher import ShapeMatcher
from turbotx.capture.size_operators import python_operators, relations_answered, wants_bool
from turbotx.capture.size_questions import sizes_from_one
from turbotx.capture.size_rules import find_size_rules
from turbotx.capture.stack_traces import remembered_stack_traces
from turbotx.capture.stride_corrections import corrected_strides
from turbotx.capture.symint_tensors import SizeTensors
from turbotx.capture.tensor_attributes import find_attributes, have_attributes, watch_attributes
from turbotx.capture.trace_errors import (
    Stopped,
    capture_error,
    describe_arguments,
    refuse_mixed_products,
)
from turbotx.capture.traced_float import FloatInput
from turbotx.capture.tracing import tracing
from turbotx.capture.unlift import fresh_constants, unlift
from turbotx.capture.value_questions import ValueQuestions, erase_numbers
from turbotx.capture.widen import Places, widen
from turbotx.errors import CaptureError
from turbotx.ir.expr import Expr, expr
from turbotx.ir.fx_nodes import is_random, remember_names
from turbotx.ir.memory_order import by_order, inverse, make_dense, moved_dims

# Composite ops that are not decomposed: the passes and the op table handle them directly, and
# their decompositions would only obscure them.
KEPT_WHOLE = frozenset((
    "aten.scaled_dot_product_attention.default", "aten.linear.default", "aten.layer_norm.default",
    "aten.rms_norm.default", "aten.group_norm.default", "aten.softmax.int", "aten.log_softmax.int",
    "aten.matmul.default",
))  # fmt: skip


@dataclass(frozen=True)
class Captured:
    """One traced call: the graph, how to pass it a call's tensors and how to rebuild the model's
    output.

    ambient: PyTorch's settings during the trace. asked: the indices of the settings that Python
    code read, besides those that affect every trace. expanded: the inputs traced as expanded.
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
    expanded: ExpandedInputs
    floats: tuple[FloatInput, ...] = ()
    effects: tuple[Effect, ...] = ()
    decisions: Decisions | None = None
    layers: LayerCalls = field(default_factory=LayerCalls)
    returned: tuple[ReturnedContainer, ...] = ()
    sought: frozenset[str] = frozenset()
    state: StateRecord | None = None

    @property
    def graph(self) -> fx.Graph:
        """The graph of ATen ops, which passes rewrite in place."""
        return self.graph_module.graph

    @cached_property
    def matcher(self) -> ShapeMatcher:
        """Matches a call's sizes against those that this capture serves."""
        rules = find_size_rules(self.dims, self.input_names, self.input_sizes, self.guards)
        return ShapeMatcher(rules)

    def takes(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether the floats that its Python code read have the same values, and no tensor
        has an attribute that it looked for."""
        same = all(x.takes(tensors) for x in self.floats)
        return same and not have_attributes(self.sought, tensors)

    def serves(self, ambient: Ambient, tensors: Sequence[torch.Tensor], outcomes: Outcomes) -> bool:
        """Return whether it serves a call, apart from sizes, whose first data-dependent conditions
        have these outcomes."""
        follows = not outcomes or (self.decisions is not None and self.decisions.follow(outcomes))
        fits = self.takes(tensors) and self.expanded.serve(tensors)
        return follows and fits and self.holds_in(ambient)

    def holds_in(self, ambient: Ambient) -> bool:
        """Return whether the PyTorch settings that its Python code read are unchanged."""
        return all(ambient[k] == self.ambient[k] for k in self.asked)


def capture(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], least: int = 2,
    fixed: Places = (), outcomes: Outcomes = (),
) -> Captured:  # fmt: skip
    """Trace `model(*args, **kwargs)` with every size of every tensor symbolic, except sizes of 0.

    least: the size that sizes of 1 and 2 are traced as. fixed: dims that become constants, with the
    call's sizes. outcomes: those of the first data-dependent conditions, see `ValueQuestions`.
    Raises CaptureError, naming the user's source line, if the model cannot be traced.
    """
    refuse_parts(model)
    leaves, spec = flatten_call(args, kwargs)
    names = name_inputs(model, args, kwargs)
    name = type(model).__name__
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise CaptureError(f"cannot capture {name}: the call has no tensor among its arguments")
    values, first = ValueQuestions(outcomes), None
    tensors, expanded = carry(leaves), ExpandedInputs()
    while True:
        try:
            made = _capture(model, leaves, spec, least, fixed, values, names, expanded)
            if made.expanded.serve(tensors):
                return made
            expanded = made.expanded.of(tensors)
        except CaptureError as error:
            first = first or error
            if not values.flip_last():
                raise first from first.__cause__


def _capture(
    model: nn.Module, leaves: Sequence[Any], spec: Structure, least: int, fixed: Places,
    values: ValueQuestions, names: list[str], expanded: ExpandedInputs,
) -> Captured:  # fmt: skip
    tensors, name = carry(leaves), type(model).__name__
    ambient = read_ambient()
    with tracing(), quiet_torch():
        recorder = StateRecorder()
        sought, reads = watch_attributes(), watch_reads(ambient)
        with recorder.installed(), no_autocast_cache(), reads as asked, sought as found:
            unfollowed = Unfollowed(model)
            recorder.also_meet = unfollowed.meet
            code_names = find_model_names(model, recorder, leaves)
            unfollowed.note_functions(code_names.functions)
            flat = FlatCall(model, leaves, spec, recorder, values, expanded)
            flat.attributes = found
            flat.given, flat.layers.names = describe_arguments(model, names, tensors), code_names
            before = look_at_generators()
            with (
                watch_entropy() as drawn,
                watch_environment() as variables,
                refuse_seeding(),
                unfollowed.refused(name),
            ):
                export = partial(_export_widened, flat, tensors, least, fixed, name)
                exported = _export_with_floats(flat, export)
            moved = look_at_generators() != before
        with without_autocast():
            captured = _describe(exported, model, flat, name, names, ambient, tuple(sorted(asked)))
        code_names.places |= {place.key: place for place in variables.values()}
        code_names.places |= find_attributes(found.sought, model, names, tensors)
        state = make_record(model, recorder, code_names, captured.effects)
        if not drawn and ((generators := recorder.find_moved()) or moved):
            again = partial(_export_with_relations, export)
            drawn = [where] if (where := find_draws(again, generators)) else []
        if drawn:
            raise CaptureError(
                f"cannot capture {name}: it draws a number from {drawn[0]}, which a program would "
                "repeat in every call. Draw with torch.rand(()) or the like, which runs in every "
                "call, or pass the number as an argument"
            )
    return replace(captured, state=state, sought=frozenset(found.sought))


@dataclass(frozen=True)
class _Exported:
    """A decomposed program, and what was found in its graph before decomposition.

    fresh: constants created by the trace. squeezed: the sizes that squeezes test. written: see
    `find_written`. shown: see `find_shown`.
    """

    program: torch.export.ExportedProgram
    fresh: set[str]
    squeezed: set[Expr]
    written: Written
    shown: tuple[Steps | None, ...]


def _export_with_floats(flat: FlatCall, export: Callable[[], _Exported]) -> _Exported:
    """Trace with the call's floats as inputs, or, if that fails, as constants."""
    try:
        return _export_with_relations(export)
    except CaptureError:
        if not flat.describe_floats():
            raise
        flat.floats.fixed = True  # an op or a class does not accept a stand-in for a number
        return _export_with_relations(export)


def _export_with_relations(export: Callable[[], _Exported]) -> _Exported:
    """Trace with comparisons of sizes as expressions, or, if that fails, as True and False."""
    try:
        return export()
    except CaptureError as error:
        if not wants_bool(error.__cause__):
            raise
    with relations_answered():
        return export()


def _export_widened(
    flat: FlatCall, tensors: Sequence[torch.Tensor], least: int, fixed: Places, name: str
) -> _Exported:
    """Trace with as many dims symbolic as possible; raises the first attempt's error.

    A size of 1 varies unless another input has a larger size at the same position, counted from the
    left, or in a later attempt from either side. If that fails too, it is taken for a broadcast
    (the call may have moved the dims) or for a number that the code writes out. A size that the
    code uses in a dict key is a constant.
    """
    first, tried = None, []
    tensors = [t.resolve_conj().resolve_neg() for t in tensors]
    spelled: frozenset[tuple[int, int]] = frozenset()
    for sides in ("left", "left", "both", "both", "none", "none"):  # again without the spelled
        examples, varying = widen(tensors, least, {*fixed, *spelled}, sides)
        examples = list(map(make_dense, examples, flat.orders))
        varying = list(map(moved_dims, varying, flat.orders))
        if varying in tried:
            continue
        tried.append(varying)
        for attention in attention_kernels(tensors):
            try:
                with attention(), equal_to(flat.recorder.find_known), flat.seen.held():
                    return _export(flat, examples, varying)
            except Exception as error:
                error = error.error if isinstance(error, Stopped) else error
                if str(error).startswith("cannot capture"):  # no other sizes would help
                    raise error from None
                spelled |= flat.seen.find_spelled(error)
                first = first or error
    assert first is not None
    raise capture_error(name, first, _find_cause(flat, tensors), flat.given) from first


def _find_cause(flat: FlatCall, tensors: Sequence[torch.Tensor]) -> Exception | bool:
    """Return the exception that the model raises at the call's own sizes, as constants: then the
    arguments are at fault. True if it raises none, so that other sizes are; False if unknown."""
    if flat.values.has_decided:  # another trace would choose other outcomes, which are tried next
        return False
    examples = list(map(make_dense, tensors, flat.orders))
    try:
        with flat.seen.held():
            _export(flat, examples, [[] for _ in examples])
    except Stopped as stopped:
        return stopped.error
    except Exception:  # in PyTorch's tracing itself
        return False
    return True


def _export(flat: FlatCall, examples: list[torch.Tensor], varying: list[list[int]]) -> _Exported:
    """Trace with the `varying` dims of each example symbolic; decompose all but the kept ops."""
    dynamic = (tuple(dict.fromkeys(dims, Dim.AUTO) or None for dims in varying),)
    fakes, places = remembering_fakes(), remembered_stack_traces()
    with torch.no_grad(), warnings.catch_warnings(), fakes, places:
        warnings.simplefilter("ignore")
        sizes, light = sizes_from_one(flat.values.answer), light_export()
        strides, copies = corrected_strides(), copying_layers(flat.layers)
        with (
            SizeTensors(), IdleDropout(), strides, padding_as_eager(), sizes,
            python_operators(), light, copies, recurrent_layers_whole(), idle_conversions(),
        ):  # fmt: skip
            exported = torch.export.export(
                flat, tuple(examples), dynamic_shapes=dynamic, strict=False
            )
        erase_numbers(exported.graph)
        write_casts(exported.graph)
        kept = KEPT_WHOLE | recurrent_ops()
        before, fresh = copy.deepcopy(exported.graph), fresh_constants(exported)
        squeezed, shown = find_squeezed(exported.graph), find_shown(exported.graph)
        write_out_of_place(exported.graph)
        written = find_written(exported.graph)
        try:
            decompose_nodes(exported.graph_module, kept)
        except NotNodeByNode:
            exported.graph_module.graph = before
            with light_decomposition():
                exported = exported.run_decompositions(table_without(kept))
    return _Exported(exported, fresh, squeezed, written, shown)


def _describe(
    exported: _Exported, model: nn.Module, flat: FlatCall, name: str, names: list[str],
    ambient: Ambient, asked: tuple[int, ...],
) -> Captured:  # fmt: skip
    refuse_mutation(exported.program, name, names)
    graph_module, inputs = unlift(exported.program, exported.fresh, model, names)
    refuse_mixed_products(graph_module.graph, name, flat.given)
    put_constants(graph_module.graph, flat.seen.constants)
    fakes = [node.meta["val"] for node in inputs]
    shapes = [by_order(f.shape, inverse(o)) for f, o in zip(fakes, flat.orders, strict=True)]
    for k, (node, order) in enumerate(zip(inputs, flat.orders, strict=True)):
        node.meta |= {ORDER: order, ASKED: flat.layouts.asked.get(k)}
    shape_env = next((f.fake_mode.shape_env for f in fakes if f.fake_mode.shape_env), None)
    said: Mapping[str, str] = getattr(model, "turbotx_dim_names", {})
    symbols = name_dims(shapes, names, find_equals(shape_env), said)
    remember_names(graph_module, symbols)
    note_layouts(graph_module.graph, exported.shown)
    expanded = replace(flat.expanded, decisive=find_decisive(graph_module.graph))
    guards = find_guards(exported.program, shape_env, symbols) + guard_sizes(graph_module, symbols)
    known = find_replaced(shape_env, symbols) | symbols
    guards += guard_squeezed(exported.squeezed, known) + guard_asked(flat.layouts.sizes, known)
    guards += guard_written(exported.written, known)
    sizes = tuple(tuple(expr(s).xreplace(symbols) for s in shape) for shape in shapes)
    dims = tuple(dict.fromkeys(s.name for s in symbols.values()))
    hints = find_hints(shape_env, symbols)
    decisions = flat.values.describe(known, dims)
    if decisions is not None and any(map(is_random, graph_module.graph.nodes)):
        raise CaptureError(
            f"cannot capture {name}: it draws random numbers and branches on a value, as at "
            f"{decisions.made[0].where}; for another outcome the call would run again, with other "
            "random numbers"
        )
    return Captured(
        graph_module, name, tuple(node.name for node in inputs), sizes, dims, hints, guards,
        flat.seen.out_spec, ambient, asked, expanded, flat.describe_floats(), flat.seen.effects,
        decisions, flat.layers.calls, flat.seen.returned,
    )  # fmt: skip
