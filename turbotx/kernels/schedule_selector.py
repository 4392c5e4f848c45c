"""Schedule selector: tiles of GEMMs and attention from options, tuning, or heuristics.

In: tags such as "m64n32k128w4s3x2l1p1" (tile, warps, stages, splits of k, and two of
`GemmSchedule`'s choices), "q64k64w4s2" or "cublas", by name or by structure and size. Out:
schedules; None for the library's GEMM::

    Tiles((("gemm_float16_768x*", "s4"),), "sm_90", load_tuned("NVIDIA H100")).gemm(template, 40)
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from turbotx.ir.matmul_kernels import AttentionKernel, ProductKernel
from turbotx.ir.quantized_ops import KIND_NAMES
from turbotx.kernels.device_classes import device_class
from turbotx.kernels.gemm_heuristics import (
    BUCKETS,
    bucket_of,
    choose_tiles,
    fits_scratch,
    prefers_folding,
    prefers_quantizing,
    prefers_template,
    shared_nbytes,
)
from turbotx.kernels.schedule import power_above
from turbotx.kernels.triton.attention import (
    FEW_QUERIES,
    choose_attention_schedule,
)
from turbotx.kernels.triton.gemm_template import GemmSchedule, GemmTemplate
from turbotx.kernels.triton.products import choose_product_schedule
from turbotx.kernels.triton.tags import LIBRARY, PARTS, AttentionTiles, with_tag
from turbotx.kernels.tuned import Tuned

# Tuned choices for a program's norms.
FOLDED, STORED = "folded", "stored"
# Most float32 sums of a tile per thread.
MOST_SUMS = 128
# The smallest k tile of int8 and fp8 products.
FEWEST_NARROW = 32


def fewest_inputs(template: GemmTemplate) -> int:
    """Return the smallest k tile of a template."""
    return max(FEWEST_NARROW * (template.narrow is not None), template.group)


def structure_of(
    made: GemmTemplate | AttentionKernel | ProductKernel | tuple[GemmTemplate, ...],
) -> str:
    """Return the digest that is the key of tuned schedules."""
    if isinstance(made, GemmTemplate) and made.experts:
        return f"{structure_of(replace(made, experts=0))}x{made.experts}"
    if isinstance(made, GemmTemplate) and made.narrow is not None:
        own: dict[str, Any] = {
            "narrow": None,
            "float_rows": False,
            "group": 0,
            "shifted": False,
            "quantizes": False,
            "peaks": False,
        }
        group = f"{made.group or ''}{'s' * made.shifted}"
        how = f"{KIND_NAMES[made.narrow]}{'w' * made.float_rows}{group}"
        plain = structure_of(replace(made, **own))
        return f"{plain}{how}{'q' * made.quantizes}{'p' * made.peaks}"
    return hashlib.sha256(repr(made).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Tiles:
    """Selects schedules for one device. overrides: (name pattern, tag). gemms, norms: the
    options."""

    overrides: Sequence[tuple[str, str]]
    target: str
    tuned: Tuned
    gemms: str = "auto"
    norms: str = "auto"

    def gemm(self, template: GemmTemplate, tokens: int) -> GemmSchedule | None:
        """Return the tiles for the bucket of `tokens`, or None for the library.

        Split-K is limited by the scratch at the bucket. GEMMs of a folded norm (`folds` decides for
        all of them) and of int8 or fp8 always use the template.
        """
        bucket = bucket_of(tokens)
        tags = self._tags(template.name, template, bucket)
        asked = [tag for tag in tags if tag != LIBRARY]
        library = tags[-1] == LIBRARY if tags else not prefers_template(
            template, bucket, self.target
        )  # fmt: skip
        if self.gemms == "triton":  # overrides count, tuning does not
            library = self._asked(template.name)[-1:] == [LIBRARY]
        if (library or self.gemms == LIBRARY) and not template.alone:
            return None
        schedule = choose_tiles(template, bucket, self.target)
        for tag in asked:
            schedule = with_tag(schedule, tag)
        if template.narrow is not None:
            schedule = replace(schedule, k_tile=max(schedule.k_tile, fewest_inputs(template)))
        while not fits_scratch(template, schedule, bucket):
            schedule = replace(schedule, splits=schedule.splits // 2)
        return schedule

    def experts(self, template: GemmTemplate, each: int) -> GemmSchedule:
        """Return the tiles for `each` rows per expert on average, without split-K or prefetch."""
        bucket = bucket_of(each)
        schedule = choose_tiles(template, bucket, self.target)
        for tag in self._tags(template.name, template, bucket):
            schedule = with_tag(schedule, tag)
        return replace(schedule, splits=1, prefetch=0)

    def folds(
        self, plain: Sequence[GemmTemplate], folded: Sequence[GemmTemplate], tokens: int
    ) -> bool:
        """Return whether to run the folded program (norms folded, or quantizing products) at the
        bucket of `tokens`.

        plain, folded: the templates of all GEMMs that differ.
        """
        quantizes = any(t.quantizes for t in folded)
        if self.norms != "auto" and not quantizes:  # the option is for norms only
            return self.norms == "fold"
        if any(self._asked(t.name)[-1:] == [LIBRARY] for t in folded):
            return False
        bucket = bucket_of(tokens)
        tuned = self.tuned.get(structure_of(tuple(folded)), {}).get(str(bucket))
        if tuned is not None:
            return tuned == FOLDED
        if quantizes:
            return prefers_quantizing(folded, bucket, self.target)
        return prefers_folding(plain, folded, bucket, self.target)

    def attention(self, kernel: AttentionKernel | ProductKernel, q_len: int) -> AttentionTiles:
        """Return the tiles of attention or one of its products, for a number of queries."""
        tags = self._tags(kernel.name, kernel, queries_bucket(q_len))
        if isinstance(kernel, ProductKernel):
            cut = choose_product_schedule(kernel, q_len)
            return functools.reduce(with_tag, tags, cut)
        return functools.reduce(with_tag, tags, choose_attention_schedule(kernel, q_len))

    def _tags(self, name: str, made: Any, bucket: int) -> list[str]:
        """Return the tuned tags, then the overrides, in order of application."""
        tuned = self.tuned.get(structure_of(made), {}).get(str(bucket))
        asked = self._asked(name)
        return [tuned, *asked] if tuned is not None else asked

    def _asked(self, name: str) -> list[str]:
        return [tag for pattern, tag in self.overrides if fnmatch.fnmatch(name, pattern)]


def queries_bucket(q_len: int) -> int:
    """Return the bucket of a number of queries, a power of two."""
    return max(FEW_QUERIES, power_above(q_len))


def gemm_neighbours(
    template: GemmTemplate, schedule: GemmSchedule | None, tokens: int, target: str
) -> list[GemmSchedule | None]:
    """Return schedules that differ in one step, and None for the library's GEMM."""
    bucket, device = bucket_of(tokens), device_class(target)
    if schedule is None:
        return [choose_tiles(template, bucket, target)]
    found: list[GemmSchedule | None] = [] if template.alone else [None]
    for other in _steps(schedule):
        sums = other.m_tile * other.n_tile * (1 + template.gated)
        if (
            sums <= MOST_SUMS * 32 * other.num_warps
            and other.m_tile <= max(16, BUCKETS[-1] if bucket == BUCKETS[-1] else bucket)
            and other.k_tile >= fewest_inputs(template)
            and other.splits * other.k_tile <= max(template.k, other.k_tile)
            and shared_nbytes(template, other) <= device.shared_nbytes
            and fits_scratch(template, other, bucket)
        ):
            found.append(other)
    return found


def attention_neighbours(schedule: AttentionTiles) -> list[AttentionTiles]:
    """Return schedules of attention or one of its products that differ in one step."""
    return list(_steps(schedule))


def _steps(schedule: Any) -> list[Any]:
    found = []
    for field, low, high in PARTS.values():
        if not hasattr(schedule, field) or field == "prefetch":
            continue  # launches are timed one by one, without a predecessor
        value = getattr(schedule, field)
        one_by_one = field in ("num_stages", "late", "once")
        near = (value - 1, value + 1) if one_by_one else (value // 2, value * 2)
        found += [replace(schedule, **{field: v}) for v in near if low <= v <= high]
    return found
