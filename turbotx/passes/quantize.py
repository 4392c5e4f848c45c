"""Quantize: products by weights become products of int8 or int4, on request.

In: a graph whose products are `linear`s. Out: the same with weights as integers and their scales,
computed from the parameters as constants are, and activations quantised by row (see
`ir.quantized_ops`), where `kernels.fusion.quantized_rows` decides, or left as they are::

    linear(x, w, b)  ->  quantized_linear(x, quantize_rows(w, s), b, s, None, float32)
                         where s = row_scale(w)
                     or  weight_only_linear(x, quantize_rows(w, s), b, s)
                     or  weight_only_linear(x, quantize_groups(w, t, 32), b, t)
                         where t = group_scale(w, 32, False)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import fx

from turbotx.errors import OptionsError
from turbotx.ir import fx_nodes as g
from turbotx.ir.int4_ops import group_scale, quantize_groups
from turbotx.ir.quantized_ops import (
    MAX_DEPTH,
    SCHEMES,
    Scheme,
    quantize_rows,
    quantized_linear,
    row_scale,
    weight_only_linear,
)
from turbotx.ir.views import SPLITS, is_view
from turbotx.options import HEAD, Options
from turbotx.passes.linear import is_weight

aten = torch.ops.aten
MOST_GIVEN = (2**31 - 1) // (128 * 127)
"""As MAX_DEPTH, for weights that may be -128."""
GPU_GROUPS = (8, 16, 32, 64, 128)
"""How many inputs may share a scale of int4 on a GPU: each tile of a weight has whole groups."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Quantization:
    """Which products are quantised: all except those of modules that match a pattern.

    paths: where in the user's module a graph's parameter is. keep_float: patterns, or HEAD.
    scheme: how. given: of parameters that are quantised already, by path, how; all: whether others
    are quantised too.
    """

    paths: Mapping[str, str]
    keep_float: Sequence[str]
    scheme: Scheme = SCHEMES["int8"]
    given: Mapping[str, Scheme] = field(default_factory=dict)
    all: bool = True

    @classmethod
    def of(
        cls, options: Options, paths: Mapping[str, str], given: Mapping[str, Scheme]
    ) -> Quantization | None:
        """Return the quantization that the options and the model's int8 weights ask for, None if
        there is none."""
        if options.quantize == "none" and not given:
            return None
        scheme = SCHEMES.get(options.quantize, Scheme())
        return cls(paths, options.keep_float, scheme, given, options.quantize != "none")

    def kind_of(self, weight: fx.Node) -> object:
        """Return a key that is equal for weights that may be packed together."""
        found = self.given_to(weight)
        if found is not None:
            return found
        return not self.all or _pattern_of(modules_of(weight, self.paths), self.keep_float)

    def given_to(self, weight: fx.Node) -> Scheme | None:
        """Return how a weight is quantised already; None for one of floats."""
        found = {self.given.get(path) for path in paths_of(weight, self.paths)}
        return found.pop() if len(found) == 1 else None


def check_target(quantize: str, given: Mapping[str, Scheme], target: str) -> None:
    """Raise OptionsError for an option, or weights that are quantised already, that a target's
    kernels do not multiply by."""
    if quantize == "fp8" and not has_fp8(target):
        raise OptionsError(
            f"quantize='fp8' multiplies e4m3 numbers, which NVIDIA GPUs from sm_89 on do, and "
            f"{target} does not: take quantize='int8' (docs/quantization.md)"
        )
    for path, scheme in given.items() if target != "cpu" else ():
        if scheme.group and scheme.group not in GPU_GROUPS:
            raise OptionsError(
                f"{path} has a scale for every {scheme.group} inputs, which runs on CPUs, and on "
                f"{target} groups of {', '.join(map(str, GPU_GROUPS))} do: quantise by one of "
                "these (docs/quantization.md)"
            )


def has_fp8(target: str) -> bool:
    """Return whether a target multiplies e4m3 as `torch.float8_e4m3fn` has it; an AMD gfx942's has
    another bias."""
    number = target.removeprefix("sm_").rstrip("af")
    return target.startswith("sm_") and number.isdigit() and int(number) >= 89


def quantize_linears(graph: fx.Graph, asked: Quantization) -> dict[str, str]:
    """Quantise every product by a weight; return the modules whose products stay float, with
    reasons."""
    kept: dict[str, str] = {}
    made: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for node in list(graph.nodes):
        if not g.is_call(node, aten.linear.default) or not is_weight(node.args[1]):
            continue
        names = modules_of(g.operand(node, 1), asked.paths)
        why = _why_float(node, names, asked)
        if why:
            kept.update(dict.fromkeys(names, why))
        else:
            given = asked.given_to(g.operand(node, 1))
            _quantize(node, given or asked.scheme, made)
    return kept


def modules_of(weight: fx.Node, paths: Mapping[str, str]) -> list[str]:
    """Return the dotted names of the modules whose parameters a weight is computed from."""
    return [path.rpartition(".")[0] for path in paths_of(weight, paths)]


def paths_of(weight: fx.Node, paths: Mapping[str, str]) -> list[str]:
    """Return the paths in the user's module of the parameters that a weight is computed from."""
    if weight.op == "get_attr":
        return [paths.get(str(weight.target), str(weight.target))]
    return [path for source in weight.all_input_nodes for path in paths_of(source, paths)]


def _is_plain(weight: fx.Node) -> bool:
    """Return whether a weight is one parameter, or several concatenated by rows."""
    joined = g.is_call(weight, aten.cat.default) and len(weight.args) == 1
    return all(n.op == "get_attr" for n in (weight.all_input_nodes if joined else [weight]))


def _pattern_of(names: Sequence[str], keep_float: Sequence[str]) -> str | None:
    # A decoder's calls with a cache are traced inside another module, `model`.
    own = [name.removeprefix("model.") for name in names] + [*names]
    return next((p for p in keep_float if any(fnmatchcase(name, p) for name in own)), None)


def _why_float(node: fx.Node, names: Sequence[str], asked: Quantization) -> str:
    """Return why a product is not quantised, "" if it is."""
    x, weight = g.operand(node, 0), g.operand(node, 1)
    given = asked.given_to(weight)
    if given is None and not asked.all:
        return "it was not asked for"
    found = _pattern_of(names, asked.keep_float) if given is None else None
    if found is not None:
        return f"keep_float={found!r} was asked for"
    if given is not None and not _is_plain(weight):
        return "its weight is quantised already, and not multiplied by as it is"
    scheme = given or asked.scheme
    exact = scheme.kind is torch.int8 and not scheme.float_rows
    most = MAX_DEPTH if given is None else MOST_GIVEN
    shape = g.shape(weight)
    if g.dtype(x) not in FLOATS or g.dtype(weight) != g.dtype(x):
        return f"it is of {g.dtype(x)}"
    if len(shape) != 2 or not all(e.is_Integer for e in shape) or 0 in shape:
        return f"its weight is of {shape}"
    if int(shape[1]) > most and exact:
        return f"sums of {shape[1]} products overflow int32"
    if given is None and HEAD in asked.keep_float and _is_returned(node):
        return "the call returns its result (keep_float=('@head',))"
    return ""


def _is_returned(node: fx.Node) -> bool:
    return any(
        u.op == "output" or ((is_view(u) or u.target in SPLITS) and _is_returned(u))
        for u in node.users
    )


def _quantize(node: fx.Node, scheme: Scheme, made: dict[fx.Node, tuple[fx.Node, fx.Node]]) -> None:
    """Quantise one product. made: weights of integers, and their scales, by what they are made of:
    layers that share a weight share these."""
    x, weight = g.operand(node, 0), g.operand(node, 1)
    with node.graph.inserting_before(node):
        if weight not in made and scheme.group:
            scale = g.emit(node, group_scale, weight, scheme.group, scheme.shifted)
            made[weight] = g.emit(node, quantize_groups, weight, scale, scheme.group), scale
        elif weight not in made:
            kind = () if scheme.kind is torch.int8 else (scheme.kind,)
            scale = g.emit(node, row_scale, weight, *kind)
            narrow = g.emit(node, quantize_rows, weight, scale, *kind)
            made[weight] = narrow, g.emit(node, aten.squeeze.dim, scale, -1)
        narrow, flat = made[weight]
        bias = g.optional(node, 2)
        args = (x, narrow, bias, flat)
        if scheme.float_rows:
            product = g.emit(node, weight_only_linear, *args)
        else:
            product = g.emit(node, quantized_linear, *args, None, g.dtype(node))
        g.replace(node, product)
