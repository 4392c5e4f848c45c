"""torch's own operator samples at small sizes: captured at a sample's own, called at 0 to 3.

In: a sample of an operator. Out: the same call with one size of its tensors changed wherever that
number occurs, and what differs between eager and turbotx over all of those, for example::

    find_size_faults(sample)  ->  ["softmax of float32[0, 20], -1: raises CaptureError"]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

import turbotx
from tests.ops.operator_samples import Sample, excess, flat_results, samples_of

SIZES = (1, 0, 2, 3)


def resized(sample: Sample) -> Iterator[Sample]:
    """Yield the sample with each of its sizes as 1, 0, 2 and 3."""
    sizes = {n for x in sample.tensors for n in x.shape}
    for old in sorted(sizes, reverse=True):
        for new in SIZES:
            if new != old:
                leaves = [
                    _resize(x, old, new) if isinstance(x, torch.Tensor) else x
                    for x in sample.leaves
                ]
                yield replace(sample, leaves=leaves)


def pick_samples(name: str, count: int) -> list[Sample]:
    """Return a few of an operator's float32 samples, spread over those that are not large."""
    found = [
        s
        for s in samples_of(name, torch.float32)
        if 1 < max((x.numel() for x in s.tensors), default=0) < 5000
    ]
    return found[:: max(1, len(found) // count)][:count]


def _resize(x: torch.Tensor, old: int, new: int) -> torch.Tensor:
    for d, size in enumerate(x.shape):
        if size == old and (old or not new):
            x = x.index_select(d, torch.arange(new) % max(1, old))
        elif size == old:
            x = x.new_zeros(*x.shape[:d], new, *x.shape[d + 1 :])
    return x


def find_size_faults(sample: Sample) -> list[str]:
    """Return where one optimized function differs from eager: values, shapes, or who raises."""
    fast = turbotx.optimize(lambda *tensors: sample.call(iter(tensors)))
    found = []
    for given in (sample, *resized(sample)):
        try:
            eager = given.eager()
        except Exception:
            eager = None
        try:
            ours = flat_results(fast(*given.tensors))
        except Exception as error:
            if eager is not None:
                what = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                found.append(f"{given}: raises {what}")
            continue
        if eager is None:
            found.append(f"{given}: eager raises")
            continue
        for a, b, c in zip(ours, eager, given.reference(), strict=True):
            fault = excess(a, b, c)
            if fault:
                found.append(f"{given}: {fault}")
    return found
