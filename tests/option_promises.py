"""What options promise, asked of any model: ways to make a fast one, and a check of its calls.

In: a model, one of `ROUTES`, and a choice of each of `OPTIONS`. Out: assertions: results by the
1.5 x rule, or near those of the same integers in PyTorch; one capture for all shapes; nothing in
eager; no warning::

    way = way_of({"route": "saved", "weights": "released"})
    check_calls(way, way.optimized(model, cases[0]), plain, cases)
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import operator
import pickle
import tempfile
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import turbotx
from tests.models import assert_as_exact_as_eager, in_double, leaves
from turbotx.engine.dynamo import compile_graph
from turbotx.errors import DecisionWarning, EagerWarning, QuantizedWarning
from turbotx.runtime.packed_parameter import PackedParameter

Inputs = dict[str, Any]
SHAPES = ((2, 17), (1, 1), (3, 40))


def call_first(fast: Any, inputs: Inputs) -> Any:
    """Make the capture that the copies below take with them."""
    with torch.no_grad():
        fast(**inputs)
    return fast


def through_file(fast: Any, **how: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.ttx"
        turbotx.save(fast, file, **how)
        return turbotx.load(file)


def as_function(model: nn.Module, **options: Any) -> Any:
    @turbotx.optimize(**options)
    def run(**inputs: Any) -> Any:
        return model(**inputs)

    return run


def of_class(model: nn.Module, **options: Any) -> Any:
    fast = turbotx.optimize(type(model), **options)(model.config).eval()
    fast.to(next(model.parameters()).dtype).load_state_dict(model.state_dict())
    return fast


def by_dynamo(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend=compile_graph, dynamic=True, options=options or None)


def pickled(fast: Any) -> Any:
    file = io.BytesIO(pickle.dumps(fast))
    return pickle.load(file)


@dataclass(frozen=True)
class Way:
    """options: of `turbotx.optimize`. make: takes a model and the options. then: what becomes of
    its result after a first call. captures: how many the calls of one kind take; None if the result
    does not count them."""

    options: Mapping[str, Any] = field(default_factory=dict)
    make: Callable[..., Any] = turbotx.optimize
    then: Callable[[Any], Any] | None = None
    captures: int | None = 1

    @property
    def quantize(self) -> str:
        return str(self.options.get("quantize", "none"))

    def optimized(self, model: nn.Module, inputs: Inputs) -> Any:
        """Return what calls go to. inputs: of the first call, where there has to be one."""
        fast = self.make(model, **self.options)
        return fast if self.then is None else self.then(call_first(fast, inputs))


ROUTES = {
    "module": Way(),
    "in place": Way({"in_place": True}),
    "function": Way(make=as_function),
    "class": Way(make=of_class),
    "dynamo": Way(make=by_dynamo, captures=None),
    "deepcopy": Way(then=copy.deepcopy),
    "pickle": Way(then=pickled),
    "saved": Way(then=through_file, captures=None),
    "saved panels": Way(then=lambda fast: through_file(fast, panels=["native"]), captures=None),
    "saved floats": Way(then=lambda fast: through_file(fast, panels=[]), captures=None),
}
QUANTIZED = ("int8", "int8-weights", "int4-weights")
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "weights": {"kept": {}, "released": {"keep_weights": False}},
    "numbers": {"floats": {}, **{name: {"quantize": name} for name in QUANTIZED}},
    "kernels": {
        "as chosen": {},
        "flash": {"attention": "flash"},
        "fused-softmax": {"attention": "fused-softmax"},
        "no epilogues": {"epilogues": False},
        "norms stored": {"norms": "store"},
        "unpacked": {"pack_weights": False},
        "aten": {"backend": "aten"},
    },
    "memory": {
        "symbolic": {},
        "chunked": {"planner": "chunked"},
        "greedy": {"planner": "greedy"},
        "one shape": {"max_shapes": 1, "max_arenas": 1},
        "launch ranges": {"launch_ranges": True},
    },
}
SAVED = ("saved", "saved panels", "saved floats")
REFUSED: list[dict[str, Sequence[str]]] = [
    {"weights": ("released",), "kernels": ("unpacked", "aten")},
    {"weights": ("released",), "route": ("dynamo",)},
    {"weights": ("released",), "numbers": QUANTIZED, "route": ("saved floats",)},
    # In PyTorch's ops it is what it would be compared with.
    {"numbers": QUANTIZED, "kernels": ("unpacked", "aten")},
    {"route": SAVED, "kernels": ("aten",)},
]
"""Levels that do not go together, and what raises or warns by name where they are asked for."""


def way_of(levels: Mapping[str, str]) -> Way:
    """Return the way of a level of each of `ROUTES` and `OPTIONS`; of the first, where none is
    given."""
    route = ROUTES[levels.get("route", "module")]
    chosen = [of[levels[name]] for name, of in OPTIONS.items() if name in levels]
    return replace(route, options=functools.reduce(operator.or_, chosen, dict(route.options)))


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Warnings of turbotx are errors."""
    with warnings.catch_warnings():
        for kind in (EagerWarning, DecisionWarning, QuantizedWarning):
            warnings.simplefilter("error", kind)
        yield


NEAR = {torch.float32: 1e-2, torch.bfloat16: 6e-2, torch.float16: 2e-2}
"""Of results' largest magnitude: some number rounds to the other neighbour."""


def assert_near(ours: Any, theirs: Any) -> None:
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.is_floating_point() and a.numel():
            allowed = NEAR[a.dtype] * max(1.0, b.abs().max().item())
            worst = (a.double() - b.double()).abs().max().item()
            assert worst <= allowed, f"error {worst:.3g} from the same integers, {allowed:.3g}"


def check_calls(way: Way, fast: Any, plain: nn.Module, cases: Sequence[Inputs]) -> None:
    """Compare calls with those of `plain`, in which nothing is optimized."""
    quantized = way.quantize != "none"
    other: Any = in_double(plain)
    if quantized:  # the same integers, in PyTorch's ops
        other = turbotx.optimize(copy.deepcopy(plain), quantize=way.quantize, backend="aten")
    for inputs in cases:
        with torch.no_grad():
            eager = plain(**inputs)
            with no_warnings():
                ours = fast(**inputs)
            if quantized:
                assert_near(ours, other(**inputs))
                continue
            wide = {k: v.double() if is_float(v) else v for k, v in inputs.items()}
            assert_as_exact_as_eager(ours, eager, other(**wide))
    if way.captures is not None:
        stats = fast.stats()
        found = tuple(stats[n] for n in ("captures", "eager_calls", "decided_otherwise"))
        assert found == (way.captures, 0, 0)


def is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def multiplied(plain: nn.Module, inputs: Inputs) -> set[str]:
    """Return the names of weights of linear layers that a call runs, and that nothing shares."""
    names = [(id(p), n) for n, p in plain.named_parameters(remove_duplicate=False)]
    shared = {i for i, count in Counter(i for i, _ in names).items() if count > 1}
    used: set[str] = set()
    kinds = [m for m in plain.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    hooks = [
        m.register_forward_hook(
            lambda m, *_: used.update(n for i, n in names if i == id(m.weight) and i not in shared)
        )
        for m in kinds
    ]
    with torch.no_grad():
        plain(**inputs)
    for hook in hooks:
        hook.remove()
    return used


def storages(model: nn.Module, names: set[str]) -> dict[str, Any]:
    """Return weak references to the memory of a model's parameters."""
    found = {n: p for n, p in model.named_parameters() if n in names}
    return {n: weakref.ref(p.untyped_storage()) for n, p in found.items()}


def released(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if isinstance(p, PackedParameter)}
