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
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.export import Dim
from torch.export.graph_signature import OutputKind
from torch.nn.attention import SDPBackend, sdpa_kernel

from turbotx.decompose import NotNodeByNode, decompose_nodes, table_without
from turbotx.effects import Effect
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
from turbotx.host_random import find_draws, look_at_generators
from turbotx.sandbox import Sandbox
from turbotx.size_tensors import SizeTensors
from turbotx.sizes import Expr, dim, expr
from turbotx.tracing import tracing
from turbotx.unlift import FRESH, unlift

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
    """One traced call: the graph, how to feed it and how to rebuild the model's own output."""

    graph_module: fx.GraphModule
    name: str
    input_names: tuple[str, ...]
    input_sizes: tuple[tuple[Expr, ...], ...]
    dims: tuple[str, ...]
    example_dims: tuple[int, ...]
    guards: tuple[Guard, ...]
    out_spec: pytree.TreeSpec
    effects: tuple[Effect, ...] = ()


class _Flat(nn.Module):
    """The model's shadow behind a flat signature: tensors in, the output's leaves out, and after
    them what the call leaves behind."""

    def __init__(self, model: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec) -> None:
        super().__init__()
        # An object of its own, because tracing undoes changes to a module.
        self.seen = Sandbox(model)
        self.model = self.seen.model
        self.constants = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self.in_spec = spec
        self.training = False

    def forward(self, *tensors: torch.Tensor) -> list[Any]:
        leaves = list(self.constants)
        for position, tensor in zip(self.positions, tensors, strict=True):
            leaves[position] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.in_spec)
        self.seen.begin(tensors)
        flat, self.seen.out_spec = pytree.tree_flatten(self.model(*args, **kwargs))
        return flat + self.seen.finish()


def capture(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], least: int = 2
) -> Captured:
    """Trace `model(*args, **kwargs)` with every size of every tensor symbolic.

    least: sizes of 1 and 2 are traced as this size; 0 traces the call's own sizes.
    Raises CaptureError, naming the user's own source line, when the model cannot be traced.
    """
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    names = _name_inputs(model, leaves, spec)
    name = type(model).__name__
    if not tensors:
        raise CaptureError(f"cannot capture {name}: the call has no tensor among its arguments")
    _refuse_inference_tensors(model)
    with tracing():
        flat = _Flat(model, leaves, spec)
        before = look_at_generators()
        exported = _export_widened(flat, tensors, least, name)
        if look_at_generators() != before:
            drawn = find_draws(lambda: _export_widened(flat, tensors, least, name))
            if drawn:
                raise CaptureError(
                    f"cannot capture {name}: it draws a number from {drawn}, which a program would "
                    "keep for good. Draw with torch.rand(()) and the like, which is done anew at "
                    "every call, or pass the number as an argument"
                )
        return _describe(exported, model, flat.seen, name, names)


def _export_widened(flat: _Flat, tensors: Sequence[torch.Tensor], least: int, name: str) -> Any:
    """Trace with as many dims symbolic as the call takes; raise the first attempt's error.

    A size of 1 varies unless a larger one stands beside it, counted from the left, or else from
    either side. Where that fails too it is taken for a broadcast (the call may have moved the dims)
    or for a number that the call spells out too. A size that the code makes a key of is fixed.
    """
    first, tried = None, []
    spelled: frozenset[tuple[int, int]] = frozenset()
    for sides in ("left", "left", "both", "none"):
        examples, varying = _widen(tensors, least, sides, spelled)
        if varying in tried:
            continue
        tried.append(varying)
        for attention in _attentions(tensors):
            try:
                with attention(), flat.seen.held():
                    return _export(flat, examples, varying)
            except Exception as error:
                spelled |= flat.seen.find_spelled(error)
                first = first or error
    assert first is not None
    raise _capture_error(name, first) from first


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
        with SizeTensors():
            exported = torch.export.export(
                flat, tuple(examples), dynamic_shapes=dynamic, strict=False
            )
        before, fresh = copy.deepcopy(exported.graph), _fresh_constants(exported)
        squeezed = find_squeezed(exported.graph)
        try:
            decompose_nodes(exported.graph_module, KEPT_WHOLE)
        except NotNodeByNode:
            exported.graph_module.graph = before
            exported = exported.run_decompositions(table_without(KEPT_WHOLE))
    exported.graph_module.meta |= {FRESH: fresh, SQUEEZED: squeezed}
    return exported


def _fresh_constants(exported: Any) -> set[str]:
    """Return the constants that only tracing made, of torch.tensor(0.5) in the model's code: the
    user has no name by which to change one later."""
    targets = {s.arg.name: s.target for s in exported.graph_signature.input_specs if s.target}
    lift = torch.ops.aten.lift_fresh_copy.default
    nodes = [n for n in exported.graph_module.graph.nodes if n.name in targets]
    return {targets[n.name] for n in nodes if all(u.target is lift for u in n.users)}


def _name_inputs(model: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec) -> list[str]:
    """Return a Python name per tensor leaf, from the parameter of forward that carries it."""
    import inspect

    args, kwargs = pytree.tree_unflatten(list(range(len(leaves))), spec)
    forward = getattr(model, "turbotx_signature_of", model.forward)
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    positional = [
        p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    labelled: dict[int, str] = {}
    for i, arg in enumerate(args):
        label = positional[i] if i < len(positional) else f"arg{i}"
        _label_leaves(arg, label, labelled)
    for label, arg in kwargs.items():
        _label_leaves(arg, str(label), labelled)
    return [labelled[i] for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]


def _label_leaves(tree: Any, label: str, labelled: dict[int, str]) -> None:
    indices = pytree.tree_leaves(tree)
    for k, index in enumerate(indices):
        labelled[index] = label if len(indices) == 1 else f"{label}_{k}"


def _widen(
    tensors: Sequence[torch.Tensor],
    least: int,
    sides: str,
    fixed: frozenset[tuple[int, int]] = frozenset(),
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Repeat size-1 dims so that tracing cannot specialise on them; list the dims that vary.

    sides: where another input with a larger size keeps a size 1 fixed: at the same position from
    the "left" or from "both" sides, as a (1, seq) mask beside (batch, seq) ids is a broadcast; with
    "none" every size 1 is fixed, and every 0. fixed: (input, dim) that do not vary. Inputs that
    are one tensor become two: tracing would take them for one argument.
    """
    largest: dict[int, int] = {}
    for tensor in tensors:
        for d, size in enumerate(tensor.shape):
            for place in (d, d - tensor.dim()):
                largest[place] = max(largest.get(place, 0), size)
    widened: list[torch.Tensor] = []
    varying = []
    for place, tensor in enumerate(tensors):
        dims = []
        rank = tensor.dim()
        if any(tensor is other for other in widened):
            tensor = tensor.clone()
        for d, size in enumerate(tensor.shape):
            beside = largest[d] if sides == "left" else max(largest[d], largest[d - rank])
            if (size == 1 and beside > 1) or (size <= 1 and (sides == "none" or not least)):
                continue
            if (place, d) in fixed:
                continue
            dims.append(d)
            if size <= 2 and size < least:
                tensor = _grow(tensor, d, least)
        widened.append(tensor)
        varying.append(dims)
    return widened, varying


def _grow(tensor: torch.Tensor, d: int, least: int) -> torch.Tensor:
    if tensor.shape[d]:
        return tensor.index_select(d, torch.arange(least, device=tensor.device) % tensor.shape[d])
    shape = list(tensor.shape)
    shape[d] = least
    return tensor.new_zeros(shape)


def _refuse_inference_tensors(model: nn.Module) -> None:
    """Raise CaptureError for parameters and buffers without a version: torch.export takes none,
    and a change of them would go unnoticed."""
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise CaptureError(
                f"cannot capture {type(model).__name__}: its {path!r} was made under "
                "torch.inference_mode(), and nothing tells when such a tensor changes. Make or "
                "load the model outside of it (torch.no_grad() is fine); calls may be inside"
            )


def _capture_error(name: str, error: Exception) -> CaptureError:
    """Return a CaptureError that points at the deepest frame outside torch and turbotx."""
    inside = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith(inside) and not f.filename.startswith("<")
    ]
    seen = str(error).strip().splitlines() or [type(error).__name__]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    if isinstance(error, CaptureError):
        return CaptureError(f"cannot capture {name}{where}\n  {error}")
    return CaptureError(
        f"cannot capture {name}{where}\n  {type(error).__name__}: {seen[0]}\n"
        "  Every call must be one graph of tensor ops: no Python branch on a tensor's values, no "
        "output that is neither a tensor nor a plain constant (for a decoder pass use_cache=False)."
    )


def _refuse_mutation(exported: Any, name: str) -> None:
    """Raise CaptureError where the call changes a buffer or an input: a program could not be run
    by two threads, or again, and mean the same."""
    for spec in exported.graph_signature.output_specs:
        if spec.kind is OutputKind.USER_OUTPUT:
            continue
        what = str(spec.target).removeprefix("model.")
        kind = "an input" if spec.kind is OutputKind.USER_INPUT_MUTATION else "its own tensor"
        raise CaptureError(
            f"cannot capture {name}: it changes {kind} {what!r} in place. Return the new value "
            "instead, or keep that part outside the optimized module"
        )


def _describe(
    exported: Any, model: nn.Module, seen: Sandbox, name: str, names: list[str]
) -> Captured:
    _refuse_mutation(exported, name)
    graph_module, inputs = unlift(exported, model, names)
    fakes = [node.meta["val"] for node in inputs]
    shape_env = next((f.fake_mode.shape_env for f in fakes if f.fake_mode.shape_env), None)
    symbols = _name_dims(fakes, names, find_equals(shape_env))
    remember_names(graph_module, symbols)
    squeezed = exported.graph_module.meta[SQUEEZED]
    guards = find_guards(exported, shape_env, symbols) + guard_sizes(graph_module, symbols)
    guards += guard_squeezed(squeezed, symbols)
    sizes = tuple(tuple(expr(s).xreplace(symbols) for s in fake.shape) for fake in fakes)
    dims = tuple(dict.fromkeys(s.name for s in symbols.values()))
    hints = _hints(shape_env, symbols)
    return Captured(
        graph_module, name, tuple(node.name for node in inputs), sizes, dims, hints, guards,
        seen.out_spec, seen.effects,
    )  # fmt: skip


def _hints(shape_env: Any, symbols: Mapping[sympy.Symbol, sympy.Symbol]) -> tuple[int, ...]:
    """Return each dim's size while tracing."""
    newer = hasattr(shape_env, "backed_var_to_val")  # torch 2.12 renamed it
    values = getattr(shape_env, "backed_var_to_val" if newer else "var_to_val", {})
    return tuple({dim: int(values.get(symbol, 2)) for symbol, dim in symbols.items()}.values())


def _name_dims(
    fakes: Sequence[torch.Tensor], names: Sequence[str],
    equals: Mapping[sympy.Symbol, sympy.Symbol],
) -> dict[sympy.Symbol, sympy.Symbol]:  # fmt: skip
    """Name dims as a user would: the first input's are batch and seq, others by input and place.

    equals: symbols that stand for the same size as another one, and get its name.
    """
    symbols: dict[sympy.Symbol, sympy.Symbol] = {}
    taken: set[str] = set()
    plain = {0: "batch", 1: "seq"}
    for fake, name in zip(fakes, names, strict=True):
        for d, size in enumerate(fake.shape):
            for symbol in sorted(expr(size).free_symbols, key=str):
                if symbol in symbols:
                    continue
                known = [s for s in symbols if equals.get(s, s) == equals.get(symbol, symbol)]
                if known:
                    symbols[symbol] = symbols[known[0]]
                    continue
                label = plain.get(d, "") if fake.dim() <= 3 or d == 0 else ""
                if not label or label in taken:
                    label = f"{name}_d{d}"
                taken.add(label)
                symbols[symbol] = dim(label)
    return symbols
