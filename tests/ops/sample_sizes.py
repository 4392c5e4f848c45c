"""torch's own operator samples at small sizes: captured at a sample's own, called at 0 to 3.

In: samples of an operator. Out: the same calls with one size of their tensors changed wherever that
number occurs, and what differs between eager and turbotx over all of those, for example::

    find_size_faults([sample])  ->  ["softmax of float32[0, 20], -1: raises CaptureError"]
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

import turbotx
from tests.ops.operator_samples import (
    Batch,
    Sample,
    dtypes_of,
    find_fault,
    find_refusal,
    samples_of,
)

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
    """Return a few of an operator's samples, spread over those that are not large: in float32, or
    in int64 where it takes no floats."""
    dtype = torch.float32 if torch.float32 in dtypes_of(name) else torch.int64
    found = [
        s
        for s in samples_of(name, dtype)
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


def find_size_faults(samples: Sequence[Sample]) -> list[str]:
    """Return where optimized samples differ from eager: values, shapes, or who raises.

    What eager takes is called side by side, a change of each sample at a time; what eager refuses
    is called alone, after a call at the sample's own sizes.
    """
    if not samples:
        return []
    taken, refused = [], []
    for sample in samples:
        changed = [(one, _is_taken(one)) for one in resized(sample)]
        taken.append([sample, *(one for one, takes in changed if takes)])
        refused.append([one for one, takes in changed if not takes])
    fast, found = turbotx.optimize(Batch(samples).call), list[str]()
    for given in itertools.zip_longest(*taken):
        chosen = [new or old for new, old in zip(given, samples, strict=True)]
        try:
            results = fast(*Batch(chosen).tensors)
        except Exception:
            for old, new in zip(samples, chosen, strict=True):
                found += _find_alone(old, new)
            continue
        found += [
            fault for pair in zip(chosen, results, strict=True) if (fault := find_fault(*pair))
        ]
    for sample, ones in zip(samples, refused, strict=True):
        found += _find_accepting(sample, ones)
    return found


def _is_taken(sample: Sample) -> bool:
    try:
        sample.eager()
    except Exception:
        return False
    return True


def _find_alone(sample: Sample, changed: Sample) -> list[str]:
    """Return what is wrong with a change that eager takes, called alone after the sample itself."""
    fast, found = turbotx.optimize(Batch([sample]).call), []
    for one in (sample, changed):
        try:
            (result,) = fast(*Batch([one]).tensors)
        except Exception as error:
            if find_refusal(error) is None:
                found.append(f"{one}: raises {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        fault = find_fault(one, result)
        found += [fault] if fault else []
    return found


def _find_accepting(sample: Sample, changed: Sequence[Sample]) -> list[str]:
    """Return the changes that eager refuses and an optimized call takes."""
    if not changed:
        return []
    fast, found = turbotx.optimize(Batch([sample]).call), []
    for one in (sample, *changed):
        with contextlib.suppress(Exception):
            fast(*Batch([one]).tensors)
            if one is not sample:
                found.append(f"{one}: eager raises")
    return found
