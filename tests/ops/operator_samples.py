"""torch's own operator samples, as functions that turbotx compiles: many samples, one capture.

In: the name of an operator in torch's database, a dtype. Out: its samples; a batch of them as one
function of all their tensors, one call a sample; and the error rule of the project::

    for batch in batches(samples_of("softmax", torch.float32)): turbotx.optimize(batch.call)
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

from turbotx.errors import CaptureError

# What tracing with symbolic sizes says about samples that it cannot take, and what that means.
REFUSED = {
    "Expected dtype int32/int64 for index": "an empty index of uint8, which only eager takes",
    "PendingUnbackedSymbolNotFound": "a position that is the value of a tensor",
    "changes an input": "an argument that the call changes in place (max_norm, running statistics)",
    "depends on values, not on shapes": "a result whose shape or branch depends on values",
    "data-dependent": "a result whose shape or branch depends on values",
    "Could not guard": "a result whose shape or branch depends on values",
}

NAMES = tuple(Path(__file__).with_name("operators.txt").read_text().split())


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


@dataclass(frozen=True, eq=False)
class Sample:
    """One call of one operator."""

    name: str
    dtype: torch.dtype
    leaves: list[Any]
    spec: pytree.TreeSpec

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [x for x in self.leaves if isinstance(x, torch.Tensor)]

    def call(self, tensors: Iterator[torch.Tensor]) -> Any:
        filled = [next(tensors) if isinstance(x, torch.Tensor) else x for x in self.leaves]
        args, kwargs = pytree.tree_unflatten(filled, self.spec)
        return _database()[self.name].op(*args, **kwargs)

    def eager(self) -> list[torch.Tensor]:
        return flat_results(self.call(iter(self.tensors)))

    def reference(self) -> list[torch.Tensor]:
        """Return the results in float64: inputs converted exactly, the operator run on them."""
        wide = [x.double() if x.is_floating_point() else x for x in self.tensors]
        try:
            return flat_results(self.call(iter(wide)))
        except (RuntimeError, NotImplementedError):
            return [x.double() if x.is_floating_point() else x for x in self.eager()]

    def __str__(self) -> str:
        shown = [
            f"{str(x.dtype)[6:]}{list(x.shape)}" if isinstance(x, torch.Tensor) else repr(x)
            for x in self.leaves
        ]
        return f"{self.name} of {', '.join(shown)}"


@dataclass(frozen=True)
class Batch:
    """Samples as one function: `call(*tensors)` returns one result per sample."""

    samples: Sequence[Sample]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The samples' tensors; where there are none, as for zeros, one that no sample takes."""
        return [x for sample in self.samples for x in sample.tensors] or [torch.zeros(2)]

    def call(self, *tensors: torch.Tensor) -> list[Any]:
        given = iter(tensors)
        return [sample.call(given) for sample in self.samples]

    def halves(self) -> list[Batch]:
        middle = len(self.samples) // 2
        return [Batch(part) for part in (self.samples[:middle], self.samples[middle:]) if part]


def samples_of(name: str, dtype: torch.dtype) -> list[Sample]:
    """Return all samples of an operator; none for a dtype that it does not take."""
    if dtype not in dtypes_of(name):
        return []
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sample in _database()[name].sample_inputs("cpu", dtype, requires_grad=False):
            args, kwargs = (sample.input, *sample.args), dict(sample.kwargs)
            leaves, spec = pytree.tree_flatten((args, kwargs))
            leaves = [x.detach() if isinstance(x, torch.Tensor) else x for x in leaves]
            found.append(Sample(name, dtype, leaves, spec))
    return found


def batches(samples: Sequence[Sample], size: int = 12) -> Iterator[Batch]:
    for begin in range(0, len(samples), size):
        yield Batch(samples[begin : begin + size])


def flat_results(value: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


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


def find_fault(sample: Sample, result: Any) -> str | None:
    """Return how a result breaks the error rule, or None."""
    eager, wide = sample.eager(), sample.reference()
    mine = pytree.tree_leaves(result)
    for k, (a, b, c) in enumerate(zip(mine, eager, wide, strict=True)):
        found = excess(a, b, c)
        if found is not None:
            return f"{sample}, result {k}: {found}"
    return None


def find_refusal(error: Exception) -> str | None:
    """Return why tracing cannot take a sample, or None if it should."""
    if not isinstance(error, CaptureError):
        return None
    return next((why for said, why in REFUSED.items() if said in str(error)), None)
