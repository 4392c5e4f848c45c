"""One small call of every row of the op table, made without tracing a function.

In: nothing. Out: for each overload its arguments, and the one-node graph of that call, which
tracing might have decomposed before a row is met; for example::

    call_of("aten.lerp.Scalar")  ->  (x, y, 0.7)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from turbotx.kernels.fusion.fuse import FusedRegion, fuse
from turbotx.ops import OPS
from turbotx.passes.partition import Region

X = torch.tensor([[-2.5, -1.5, -0.5, 0.0, 0.3, 0.5], [0.75, 1.0, 1.5, 2.5, -0.25, -1.0]])
Y = torch.tensor([[0.5, -1.5, 2.0, 1.0, -0.3, 0.5], [1.0, 0.25, -2.0, 2.5, 3.0, -1.0]])
POSITIVE, INSIDE = X.abs() + 1, X / 3  # where log and acosh, and where asin and atanh, are finite
K = torch.tensor([[3, -7, 0, 5, 2, 1], [9, 4, -2, 6, 1, 8]])
SHIFT = torch.tensor([[0, 1, 2, 3, 1, 0]])
MASK = X > 0
WEIGHT, BIAS = torch.linspace(-1, 2, 6), torch.linspace(1, 0, 6)
CHANNELS = torch.arange(24.0).reshape(2, 4, 3).sin()
SIZE = {"dtype": torch.float32}


@dataclass
class Sample:
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def _sample(*args: Any, **kwargs: Any) -> Sample:
    return Sample(args, kwargs)


# What the defaults by schema below do not fit: overloads, or all overloads of an op.
SPECIAL = {
    "arange.start_step": _sample(2, 9, 3),
    "full.default": _sample([2, 6], 0.7, **SIZE),
    "full_like": _sample(X, 0.7),
    "new_full": _sample(X, [3, 2], 0.7),
    "zeros": _sample([2, 6], **SIZE),
    "ones": _sample([2, 6], **SIZE),
    "new_zeros": _sample(X, [3, 2]),
    "new_ones": _sample(X, [3, 2]),
    "scalar_tensor": _sample(0.7, **SIZE),
    "embedding": _sample(X, torch.tensor([[1, 0, 1]])),
    "gather": _sample(X, 1, torch.tensor([[5, 0], [2, 2]])),
    "index_select": _sample(X, 1, torch.tensor([4, 0, 4])),
    "index": _sample(X, [torch.tensor([1, 0]), torch.tensor([-1, 3])]),
    "cat": _sample([X, Y, X], 1),
    "constant_pad_nd": _sample(X, [1, 2, 0, 1], 0.7),
    "flip": _sample(X, [0, 1]),
    "roll": _sample(X, [2, -1], [1, 0]),
    "repeat": _sample(X, [2, 3]),
    "copy": _sample(K, X[:, :1]),
    "slice_scatter": _sample(X, Y[:, :2], 1, 1, 5, 2),
    "tril": _sample(X, 1),
    "triu": _sample(X, -1),
    "div.Tensor_mode": _sample(X, Y, rounding_mode="floor"),
    "div.Scalar_mode": _sample(X, 0.7, rounding_mode="trunc"),
    "pow.Tensor_Scalar": _sample(POSITIVE, 2.5),
    "pow.Tensor_Tensor": _sample(POSITIVE, Y),
    "pow.Scalar": _sample(2.5, X),
    "addcmul": _sample(X, Y, INSIDE, value=0.7),
    "lerp.Scalar": _sample(X, Y, 0.7),
    "lerp.Tensor": _sample(X, Y, INSIDE),
    "round.decimals": _sample(X, decimals=1),
    "gelu": _sample(X, approximate="tanh"),
    "elu": _sample(X, 0.7, 1.2, 0.9),
    "ldexp": _sample(X, SHIFT),
    "clamp.default": _sample(X, -0.7, 1.2),
    "clamp.Tensor": _sample(X, INSIDE - 1, Y.abs()),
    "where.self": _sample(MASK, X, Y),
    "where.ScalarOther": _sample(MASK, X, 0.7),
    "masked_fill.Scalar": _sample(X, MASK, 0.7),
    "masked_fill.Tensor": _sample(X, MASK, torch.tensor(0.7)),
    "_to_copy": _sample(X, dtype=torch.int32),
    "bitwise_left_shift.Scalar_Tensor": _sample(5, SHIFT),
    "bitwise_left_shift.Tensor_Scalar": _sample(K, 2),
    "bitwise_left_shift": _sample(K, SHIFT),
    "bitwise_right_shift.Scalar_Tensor": _sample(500, SHIFT),
    "bitwise_right_shift.Tensor_Scalar": _sample(K, 2),
    "bitwise_right_shift": _sample(K, SHIFT),
    "bitwise_not": _sample(K),
    "__and__": _sample(K, SHIFT),
    "__or__": _sample(K, SHIFT),
    "__xor__": _sample(K, SHIFT),
    "argmax": _sample(X, 1),
    "argmin": _sample(X),
    "cumsum": _sample(X, 1),
    "cumprod": _sample(X, 0),
    "prod.dim_int": _sample(X, 1),
    "var.correction": _sample(X, [1], correction=1),
    "var.dim": _sample(X, [1], False),
    "std.correction": _sample(X, [0], correction=0, keepdim=True),
    "linalg_vector_norm": _sample(X, 3, [1]),
    "softmax": _sample(X, 1),
    "_softmax": _sample(X, 0, False),
    "log_softmax": _sample(X, 1),
    "_log_softmax": _sample(X, 1, False),
    "_safe_softmax": _sample(X.masked_fill(X < 0.8, -torch.inf), 1),
    "layer_norm": _sample(X, [6], WEIGHT, BIAS),
    "rms_norm": _sample(X, [6], WEIGHT, 1e-6),
    "group_norm": _sample(CHANNELS, 2, WEIGHT[:4], BIAS[:4]),
    "turbotx.row_scale.default": _sample(X),
    "turbotx.quantize_rows.default": _sample(X, X.abs().amax(-1, keepdim=True) / 127),
    "turbotx.quantize_affine.default": _sample(X, 7.3, 3, -20, 20),
    "turbotx.quantize_affine.tensor": _sample(
        X, torch.tensor([0.137]), torch.tensor([131]), 128, -20, 20
    ),
}  # fmt: skip
DOMAINS = {
    POSITIVE: ("log", "sqrt", "rsqrt", "acosh", "log2", "log1p", "log10"),
    INSIDE: ("asin", "acos", "atanh"),
}


def sample_of(overload: str) -> Sample:
    """Return arguments for a row: those of SPECIAL, or x, y and 0.7 as its schema asks."""
    name = overload.removeprefix("aten.")
    base = name.split(".")[0]
    if name in SPECIAL or base in SPECIAL:
        return SPECIAL.get(name) or SPECIAL[base]
    whole = base.startswith("bitwise")
    tensors = iter((K, SHIFT) if whole else (X, Y, INSIDE))
    first = next((x for x, names in DOMAINS.items() if base in names), None)
    args: list[Any] = []
    schema = next(op for op in OPS if str(op) == overload)._schema
    for a in schema.arguments:
        kind = str(a.type)
        if a.kwarg_only:
            break
        if kind == "Tensor" or kind == "Optional[Tensor]":
            args.append(first if first is not None and not args else next(tensors))
        elif a.name in ("dim",) and "List" in kind:
            args.append([1])
        elif a.name == "dim":
            args.append(1)
        elif not a.has_default_value():
            args.append(3 if whole else 0.7)
        else:
            break
    return Sample(tuple(args))


@dataclass
class Call:
    """A row's sample as a graph of one call: `tensors` go to the placeholders, in order."""

    overload: str
    target: Any
    sample: Sample
    tensors: list[torch.Tensor]
    fused: FusedRegion

    def eager(self, wide: bool = False) -> torch.Tensor:
        """Return ATen's own result; with `wide` on float64."""
        args, kwargs = self.sample.args, self.sample.kwargs
        if wide:
            args = torch.utils._pytree.tree_map_only(torch.Tensor, _widen, args)
            doubles = {torch.float32: torch.float64}
            kwargs = {k: doubles.get(v, v) if k == "dtype" else v for k, v in kwargs.items()}
        return self.target(*args, **kwargs)


def _widen(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.is_floating_point() else x


def call_of(overload: str) -> Call:
    """Return the call of a row on its sample, lowered to its kernels."""
    sample = sample_of(overload)
    target = next(op for op in OPS if str(op) == overload)
    graph, tensors = fx.Graph(), []
    with FakeTensorMode() as mode:

        def place(x: torch.Tensor) -> fx.Node:
            node = graph.placeholder(f"x{len(tensors)}")
            node.meta["val"] = mode.from_tensor(x)
            tensors.append(x)
            return node

        args = torch.utils._pytree.tree_map_only(torch.Tensor, place, sample.args)
        node = graph.call_function(target, args, sample.kwargs)
        fakes = torch.utils._pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], args)
        node.meta["val"] = target(*fakes, **sample.kwargs)
    graph.output((node,))
    return Call(overload, target, sample, tensors, fuse(Region((node,), (node,))))


def overloads() -> list[str]:
    return [str(op) for op in OPS]
