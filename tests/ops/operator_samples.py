"""torch's own operator samples, as functions that turbotx compiles: many samples, one capture.

In: the name of an operator in torch's database, a dtype. Out: batches of samples, each a function
of all their tensors that calls the operator once per sample, and the error rule of the project::

    for batch in batches("softmax", torch.float32): compile_function(batch.call, *batch.tensors)
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

FLOATS = (torch.float32, torch.bfloat16)


@functools.cache
def _database() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return {
        op.name + (f".{op.variant_test_name}" if op.variant_test_name else ""): op for op in op_db
    }


def dtypes_of(name: str) -> set[torch.dtype]:
    return set(_database()[name].dtypes)


@dataclass
class Batch:
    """Samples of one operator: `call(*tensors)` returns one result per sample."""

    name: str
    dtype: torch.dtype
    samples: list[tuple[list[Any], pytree.TreeSpec]]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [x for leaves, _ in self.samples for x in leaves if isinstance(x, torch.Tensor)]

    @property
    def operator(self) -> Any:
        return _database()[self.name].op

    def call(self, *tensors: torch.Tensor) -> list[Any]:
        given = iter(tensors)
        results = []
        for leaves, spec in self.samples:
            filled = [next(given) if isinstance(x, torch.Tensor) else x for x in leaves]
            args, kwargs = pytree.tree_unflatten(filled, spec)
            results.append(self.operator(*args, **kwargs))
        return results

    def halves(self) -> list[Batch]:
        middle = len(self.samples) // 2
        parts = (self.samples[:middle], self.samples[middle:])
        return [Batch(self.name, self.dtype, part) for part in parts if part]

    def describe(self) -> str:
        shown = []
        for leaves, spec in self.samples:
            parts = [
                f"{tuple(x.shape)}{str(x.dtype)[6:]}" if isinstance(x, torch.Tensor) else repr(x)
                for x in leaves
            ]
            shown.append(str(pytree.tree_unflatten(parts, spec)))
        return "; ".join(shown)


def batches(name: str, dtype: torch.dtype, size: int = 24) -> Iterator[Batch]:
    """Yield all samples of an operator; those that eager itself refuses are left out."""
    op = _database()[name]
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sample in op.sample_inputs("cpu", dtype, requires_grad=False):
            args, kwargs = (sample.input, *sample.args), dict(sample.kwargs)
            leaves, spec = pytree.tree_flatten((args, kwargs))
            leaves = [x.detach() if isinstance(x, torch.Tensor) else x for x in leaves]
            found.append((leaves, spec))
    for begin in range(0, len(found), size):
        yield Batch(name, dtype, found[begin : begin + size])


def flat_results(value: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


def reference(batch: Batch, eager: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the results in float64: inputs converted exactly, the operator run on them."""
    given = [x.double() if x.is_floating_point() else x for x in batch.tensors]
    try:
        wide = flat_results(batch.call(*given))
    except (RuntimeError, NotImplementedError):
        return [x.double() if x.is_floating_point() else x for x in eager]
    return wide


def excess(ours: torch.Tensor, eager: torch.Tensor, wide: torch.Tensor) -> str | None:
    """Return what breaks the error rule, or None: 1.5 x eager's own error plus 2 ulp."""
    if ours.shape != eager.shape or ours.dtype != eager.dtype:
        return f"{ours.shape} {ours.dtype} instead of {eager.shape} {eager.dtype}"
    if ours.numel() == 0:
        return None
    if not ours.is_floating_point():
        wrong = int((ours != eager).sum())
        return f"{wrong} of {ours.numel()} elements differ" if wrong else None
    wide = wide.double()
    finite = eager.isfinite() & wide.isfinite()
    same = torch.where(finite, ours.isfinite(), (ours == eager) | (ours.isnan() & eager.isnan()))
    if not bool(same.all()):
        at = int((~same).reshape(-1).nonzero()[0])
        return f"{ours.reshape(-1)[at]} instead of {eager.reshape(-1)[at]} at {at}"
    if not bool(finite.any()):
        return None
    info = torch.finfo(eager.dtype)
    magnitude = wide.abs().clamp(min=info.tiny)
    allowed = 2 * info.eps * magnitude + 1.5 * (eager.double() - wide)[finite].abs().max()
    over = torch.where(finite, (ours.double() - wide).abs() - allowed, -1.0)
    if float(over.max()) <= 0:
        return None
    at = int(over.reshape(-1).argmax())
    return (
        f"{ours.reshape(-1)[at].item():.9g} instead of {wide.reshape(-1)[at].item():.9g}, "
        f"eager {eager.reshape(-1)[at].item():.9g}, at {at}"
    )
