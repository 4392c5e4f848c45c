"""Casts: makes the conversions of autocast explicit as casts in the graph.

In: an exported graph, traced with autocast on, whose values have the dtypes that autocast gives
them; autocast is still on. Out: the same graph, with a cast before each argument that autocast
would cast, so that it computes the same with autocast off::

    linear(x, w, b)  ->  linear(_to_copy(x, bfloat16), _to_copy(w, bfloat16), _to_copy(b, bfloat16))
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from turbotx.capture.ambient import DEVICES, without_autocast
from turbotx.errors import CaptureError
from turbotx.ir.fx_nodes import fake_mode_of, meta_without_value

aten = torch.ops.aten
_CASTS = (aten._to_copy.default, aten.to.dtype)
"""The ops of a cast; `to` is not decomposed for tensors made in inference mode, which have no
autograd key."""
_KEYS = {name: f"Autocast{name.upper()}" for name in DEVICES}


def is_cast(op: OpOverload) -> bool:
    """Return whether autocast, as currently set, may cast an op's arguments."""
    return any(
        torch.is_autocast_enabled(device)
        and torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key)
        for device, key in _KEYS.items()
    )


def inside(op: OpOverload) -> AbstractContextManager[object]:
    """Return the context to decompose an op in: autocast stays on if PyTorch, too, runs the op as
    several ops that autocast sees one by one; otherwise it is off."""
    composite = op._can_decompose() and not is_cast(op)
    return nullcontext() if composite else without_autocast()


def write_casts(graph: fx.Graph) -> None:
    """Insert autocast's casts into a graph, in place; does nothing if autocast is off.

    Raises CaptureError, naming the op, if autocast has an effect that casts of its arguments cannot
    express.
    """
    known: dict[Any, list[torch.dtype | None]] = {}
    on = any(torch.is_autocast_enabled(device) for device in _KEYS)
    for node in list(graph.nodes) if on else ():
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        if not is_cast(node.target):
            continue
        sources = node.all_input_nodes
        kinds = [_kind(n.meta.get("val")) for n in sources]
        key = (node.target, tuple(kinds), _kind(node.meta.get("val")), _plain(node))
        if key not in known:
            known[key] = _find_casts(node, sources)
        _insert(node, sources, known[key])


def _kind(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device
    return type(value)


def _plain(node: fx.Node) -> str:
    """Return a call's explicit dtypes and the names of its keyword arguments, as text for
    comparison."""
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    return repr([x for x in leaves if isinstance(x, torch.dtype)]) + repr(sorted(node.kwargs))


def _find_casts(node: fx.Node, sources: list[fx.Node]) -> list[torch.dtype | None]:
    """Return the dtype that each tensor argument of a call is cast to; None for those left as they
    are."""
    values: list[Any] = [n.meta.get("val") for n in sources]
    watch = _FirstCasts(values)
    wanted = _dtypes(node.meta["val"])
    _run(node, {}, watch)
    found = [watch.made.get(id(v)) for v in values]
    # Some ops are passed a dtype to compute in, which is equivalent to a cast to it.
    higher = [torch.float32 if _is_lower(v) else None for v in values]
    for casts in (found, higher):
        given = {
            n: v.to(dtype)
            for n, v, dtype in zip(sources, values, casts, strict=True)
            if dtype is not None
        }
        with without_autocast():
            if _dtypes(_run(node, given)) == wanted:
                return casts
    raise CaptureError(
        f"autocast computes {node.format_node()} as {wanted}, which casts of its arguments do not: "
        "run it under torch.autocast(..., enabled=False)\n" + str(node.meta.get("stack_trace", ""))
    )


def _run(node: fx.Node, instead: dict[fx.Node, Any], watch: Any = None) -> Any:
    def value(n: fx.Node) -> Any:
        return instead.get(n, n.meta["val"])

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    mode, call = fake_mode_of((args, kwargs)), cast(Callable[..., Any], node.target)
    if mode is None:
        return node.meta["val"]  # no tensor arguments: nothing to cast
    with torch.no_grad(), enable_python_dispatcher(), mode, watch or nullcontext():
        return call(*args, **kwargs)


def _is_lower(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _dtypes(value: Any) -> list[torch.dtype]:
    return [t.dtype for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def _insert(node: fx.Node, sources: list[fx.Node], casts: list[torch.dtype | None]) -> None:
    for source, dtype in zip(sources, casts, strict=True):
        if dtype is None:
            continue
        with node.graph.inserting_before(node):
            made = node.graph.call_function(aten._to_copy.default, (source,), {"dtype": dtype})
        made.meta = meta_without_value(node)
        fake = source.meta["val"]
        with torch.no_grad(), without_autocast(), fake.fake_mode:
            made.meta["val"] = aten._to_copy.default(fake, dtype=dtype)
        node.replace_input_with(source, made)


class _FirstCasts(TorchDispatchMode):
    """Records the casts of given tensors that come before any other op."""

    def __init__(self, tensors: list[Any]) -> None:
        super().__init__()
        self.known = {id(t) for t in tensors if isinstance(t, torch.Tensor)}
        self.made: dict[int, torch.dtype] = {}
        self.started = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CASTS and id(args[0]) in self.known and not self.started:
            dtype = args[1] if func is aten.to.dtype and len(args) > 1 else kwargs.get("dtype")
            if dtype is not None:
                self.made[id(args[0])] = dtype
        elif func.namespace != "prim":  # prim ops only query a tensor's device and the like
            self.started = True
        return func(*args, **kwargs)
