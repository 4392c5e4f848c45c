"""GEMM heuristics: tiles of a GEMM, and whether to use a template or the library, by device class.

In: the number of tokens, a `GemmTemplate`, a target. Out: a `GemmSchedule` and the job to compile,
and which of two ways is expected to be faster. Choices are made per bucket of tokens, so that a
handful of builds serve all lengths::

    choose_tiles(template, tokens=40, target="sm_90")
        ->  GemmSchedule(m_tile=64, n_tile=32, k_tile=128, ..., splits=2)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from turbotx.kernels.device_classes import DeviceClass, device_class
from turbotx.kernels.heuristics import class_name
from turbotx.kernels.job import Job
from turbotx.kernels.triton.compiler import POINTEES, fit_warps
from turbotx.kernels.triton.gemm import print_triton_gemm
from turbotx.kernels.triton.gemm_template import (
    GemmSchedule,
    GemmTemplate,
    gemm_arguments,
    gemm_scratch,
)
from turbotx.kernels.triton.gemm_tiles import known_tiles
from turbotx.kernels.triton.prefetch import print_prefetch
from turbotx.kernels.triton.tags import with_tag

# Upper ends of token buckets.
BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 4096)
# Least steps through k of a part of a split sum: fewer do not hide memory latency.
FEWEST_STEPS = 3
MOST_SPLITS = 8
MOST_STAGES = 6
# Pipeline stages that allow two programs of narrow tiles on a multiprocessor.
FEWEST_SHARED = 3
# Rate of a product that quantizes its rows, relative to one of int8 rows: H200, 4096 x 768 x 3072
# 44.7 us and 19.5, 768 x 768 15.4 and 8.8.
QUANTIZING_RATE = 0.43
# Scratch of a program: float32 partial sums of one launch, and its tiles' counters.
SPLIT_SUMS_NBYTES = 1 << 21
MOST_TURNS = 512
STRIDES = ("x_row", "w_row", "out_row", "residual_row")


# A template's rate relative to the library's if compute-bound, and the cost of a launch in a CUDA
# graph. Assumed, not measured: `turbotx tune` overrides them.
TEMPLATE_RATE = {2: 0.75, 4: 0.3}
LAUNCH_US = 2.5
# L2 bandwidth relative to memory's, assumed.
L2_RATE = 2.0
# Tokens up to which streaming the weight dominates.
FEW_TOKENS = 64
# Tokens up to which norms may be folded, assumed: a template's loss to the library grows with the
# tokens, the cost of a norm's kernel hardly does.
MOST_FOLDED = 256


def bucket_of(tokens: int) -> int:
    """Return the bucket of a number of tokens; the last one includes all larger numbers."""
    return next((b for b in BUCKETS if tokens <= b), BUCKETS[-1])


def choose_tiles(template: GemmTemplate, tokens: int, target: str) -> GemmSchedule:
    """Return the tiles for the bucket of `tokens`, from a table if it has the GEMM, else by
    rule."""
    t, bucket = template, bucket_of(tokens)
    schedule = choose_by_rule(t, bucket, target)
    if t.item_nbytes != 2 or t.flipped or (t.folds and bucket > MOST_FOLDED):
        return schedule  # the tables' large tiles spill with a norm: 106 words at 128 x 256
    tag = known_tiles(class_name(target), bucket, t.n, t.k, t.gated)
    return schedule if tag is None else with_tag(schedule, tag)


def choose_by_rule(template: GemmTemplate, tokens: int, target: str) -> GemmSchedule:
    """Return the rule's tiles for the bucket of `tokens`.

    For few tokens the weight is streamed once: tiles are narrow, and k is split until all
    multiprocessors have work. For many, tiles are as large as registers allow.
    """
    device, bucket = device_class(target), bucket_of(tokens)
    if _is_exact(template):
        return _on_ordinary_units(template, bucket, device)
    if FEW_TOKENS < bucket <= device.few_tokens:
        return _in_two_tiles(template, bucket, device)
    most = device.widest_of(template)[0]
    m_tile = min(most, max(16, bucket)) if bucket <= 256 else most
    if template.quantizes and bucket > 256:  # H200, 4096 x 768 x 3072: 44.7 us, of 128 rows 71.9
        m_tile = min(m_tile, 64)
    n_tile = _widest_that_fills(template, bucket, m_tile, device)
    k_tile, stages = _fit_shared(template, bucket, m_tile, n_tile, device)
    # With a norm 128 x 64 took 254 registers of 4 warps on sm_100, and spilled a word.
    most = 128 * (64 if template.norm != "none" else 128)
    # Row statistics of 128 x 32 x 64 spilled 12 words there, at 72 registers, and a gate 6; 8 warps
    # take 56.
    few = (template.stats or template.gated) and (m_tile, n_tile, k_tile) == (128, 32, 64)
    held = template.widened or template.gated
    # x is in registers: 4 to 31 words spilled beyond.
    if template.quantizes and (m_tile == 128 or bucket > 256):
        few, k_tile = True, min(k_tile, 64 if n_tile == 32 or held else 128)
    elif template.quantizes and template.widened and m_tile == 64:  # 64 x 32 x 256: 4, on sm_89
        k_tile = min(k_tile, 128)
    warps = 8 if m_tile * n_tile * (1 + template.gated) >= most or few else 4
    splits = _splits(template, bucket, m_tile, n_tile, k_tile, device)
    schedule = GemmSchedule(m_tile, n_tile, k_tile, warps, stages, splits)
    return _keep_busy(template, schedule, bucket, device) if bucket <= FEW_TOKENS else schedule


def _fit_shared(
    template: GemmTemplate, bucket: int, m_tile: int, n_tile: int, device: DeviceClass
) -> tuple[int, int]:
    """Return the k tile and the stages of which all tiles in flight fit shared memory."""
    depth = 128 if template.k >= 2048 and m_tile * n_tile <= 64 * 64 else 64
    k_tile, stages = depth * 2 // template.factor_nbytes, device.stages
    held = partial(_held_nbytes, template, m_tile, n_tile)
    while stages > 2 and held(k_tile, stages) > device.shared_nbytes:
        stages -= 1
    while k_tile > 32 and held(k_tile, stages) > device.shared_nbytes:
        k_tile //= 2
    large = template.kind != "none" and m_tile * n_tile > 64 * 64 and bucket > FEW_TOKENS
    if large and 2 * held(k_tile, FEWEST_SHARED) <= device.shared_nbytes:
        # Two programs share a processor: 30.0 -> 19.5 us of int8 at 4096 x 768 x 3072, H200.
        stages = min(stages, FEWEST_SHARED)
    return k_tile, stages


def _keep_busy(
    template: GemmTemplate, schedule: GemmSchedule, bucket: int, device: DeviceClass
) -> GemmSchedule:
    """Increase the k tile, then the stages, until enough of the weight is in flight."""
    t, s = template, schedule
    row_nbytes = t.item_nbytes * (1 + t.gated)
    wanted = min(device.in_flight_nbytes, row_nbytes * t.n * t.k)
    while True:
        blocks = -(-bucket // s.m_tile) * -(-t.n // s.n_tile) * s.splits
        together = device.processors * max(1, device.shared_nbytes // shared_nbytes(t, s))
        steps = min(s.num_stages - 1, -(-t.k // s.k_tile // s.splits))
        held = min(blocks, together) * steps * s.n_tile * s.k_tile * row_nbytes
        if held >= wanted:
            return s
        if s.k_tile * t.factor_nbytes < 256:
            splits = _splits(t, bucket, s.m_tile, s.n_tile, 2 * s.k_tile, device)
            more = replace(s, k_tile=2 * s.k_tile, splits=splits)
        else:
            more = replace(s, num_stages=s.num_stages + 1)
        if more.num_stages > MOST_STAGES or shared_nbytes(t, more) > device.shared_nbytes:
            return s
        s = more


def _widest_that_fills(
    template: GemmTemplate, bucket: int, m_tile: int, device: DeviceClass
) -> int:
    """Return the widest n tile that gives every multiprocessor a program; 32 if none does."""
    widest = device.widest_of(template)[1] // (1 + template.gated)
    # Sums of 128 x 256 do not fit beside a norm, rows to be rounded, or another activation than a
    # 16-bit GELU: by erf it spilled 20 words. H200, 4096 x 3072 x 768: 40.6 us, 128 x 128: 48.9.
    fits = template.activation == "none" or template.light_gelu
    if m_tile <= 32 or not fits or template.folds or template.quantizes:
        widest = min(widest, 128)
    held = template.widened or (template.gated and template.x_nbytes == 4)
    if template.quantizes and held:  # x in registers: 128 x 128 spilled 14 to 1107 words
        widest = min(widest, 128 // (1 + template.gated))
    # Two int4 weights are unpacked in registers: 64 x 64 x 128 spilled 31 to 81 words on sm_80.
    if template.group and template.gated and bucket <= FEW_TOKENS:
        widest = 32
    for n_tile in (256, 128, 64):
        tiles = -(-bucket // m_tile) * -(-template.n // n_tile)
        if n_tile <= widest and tiles >= device.processors:
            return n_tile
    return 32


def _in_two_tiles(template: GemmTemplate, bucket: int, device: DeviceClass) -> GemmSchedule:
    """Return two or four tiles of 64 tokens, which share the weight through L2: see
    `gemm_tiles`."""
    t, k_tile = template, 64 * 2 // template.factor_nbytes
    tiles = -(-bucket // 64) * -(-t.n // 64)
    n_tile = 64 if 2 * tiles >= device.processors or t.k >= 2048 else 32
    splits = _splits(t, bucket, 64, n_tile, k_tile, device)
    stages = 5 if _held_nbytes(t, 64, n_tile, k_tile, 5) <= device.shared_nbytes else 4
    return GemmSchedule(64, n_tile, k_tile, 8 if t.gated else 4, stages, splits)


def _on_ordinary_units(template: GemmTemplate, bucket: int, device: DeviceClass) -> GemmSchedule:
    """Return tiles for full float32 products, without matrix units: small, with few stages."""
    m_tile = 16 if bucket <= 16 else 32
    # 32 x 64 spilled 4 bytes on sm_80 with every part of the epilogue.
    splits = _splits(template, bucket, m_tile, 32, 32, device)
    return GemmSchedule(m_tile, 32, 32, 4, 2, splits)


def _held_nbytes(template: GemmTemplate, m: int, n: int, k: int, stages: int) -> int:
    t, wide = template, n * (1 + template.gated)
    unpacked = wide * t.factor_nbytes * k if t.float_rows else 0
    packed = wide * t.item_nbytes * k // (2 if t.group else 1)
    return (m * t.x_nbytes * k + packed) * stages + unpacked


def shared_nbytes(template: GemmTemplate, schedule: GemmSchedule) -> int:
    """Return the bytes of shared memory of the tiles in flight."""
    s = schedule
    return _held_nbytes(template, s.m_tile, s.n_tile, s.k_tile, s.num_stages)


def _splits(
    template: GemmTemplate, bucket: int, m_tile: int, n_tile: int, k_tile: int, device: DeviceClass
) -> int:
    """Return the number of split-K parts that gives all multiprocessors work."""
    tiles = -(-bucket // m_tile) * -(-template.n // n_tile)
    steps = -(-template.k // k_tile)
    part_nbytes = 4 * tiles * m_tile * n_tile * (1 + template.gated)
    splits = 1
    while (
        splits < MOST_SPLITS
        and bucket < BUCKETS[-1]  # which holds any number of tokens
        and tiles <= MOST_TURNS
        and tiles * splits * 2 <= device.processors
        and steps // (splits * 2) >= FEWEST_STEPS
        and part_nbytes * splits * 2 <= SPLIT_SUMS_NBYTES
    ):
        splits *= 2
    return splits


def fits_scratch(template: GemmTemplate, schedule: GemmSchedule, bucket: int) -> bool:
    """Return whether the scratch holds the partial sums of any launch of a bucket."""
    partial_nbytes, turns_nbytes = gemm_scratch(template, schedule, bucket)
    if bucket == BUCKETS[-1]:
        return schedule.splits == 1
    return partial_nbytes <= SPLIT_SUMS_NBYTES and turns_nbytes <= 4 * MOST_TURNS


def prefers_template(template: GemmTemplate, tokens: int, target: str) -> bool:
    """Return whether a template is expected to be faster than the library's GEMM and an epilogue
    kernel.

    Few tokens: the weight is streamed once and one launch is saved. Many: the library's higher rate
    is weighed against the bytes that the epilogue kernel moves.
    """
    bucket = bucket_of(tokens)  # one answer for all that belong to it
    if template.narrow is not None:
        return True  # no library scales sums by row and column before the epilogue
    if bucket <= device_class(target).few_tokens and not _is_exact(template):
        return True
    template_us, library_us = expected_us(template, bucket, target)
    return template_us < library_us


def prefers_folding(
    plain: Iterable[GemmTemplate], folded: Iterable[GemmTemplate], tokens: int, target: str
) -> bool:
    """Return whether GEMMs with folded norms are expected to be faster than plain GEMMs and a
    kernel for each norm, each with the faster of template and library."""
    folded, bucket = list(folded), bucket_of(tokens)
    if bucket > MOST_FOLDED:
        return False
    device = device_class(target)
    most = device.most_folded or FEW_TOKENS
    if not any(_is_exact(t) for t in folded) and (bucket <= most or device.most_folded):
        return bucket <= most
    rate = device.tb_per_s * 1e6
    plain_us = sum(min(expected_us(t, bucket, target)) for t in plain)
    for t in folded:  # a norm's kernel reads the sums and a residual, and writes rows and result
        plain_us += t.stats * (LAUNCH_US + 4 * t.dtype.itemsize * bucket * t.n / rate)
    return sum(expected_us(t, bucket, target)[0] for t in folded) < plain_us


def prefers_quantizing(folded: Iterable[GemmTemplate], tokens: int, target: str) -> bool:
    """Return whether products should quantize rows as they load them, instead of a kernel before
    them.

    A kernel reads floats and writes int8, which every tile of columns reads from L2; otherwise
    every tile reads floats and multiplies at a lower rate, since it rounds them again."""
    device = device_class(target)
    moved = extra_us = saved_us = 0.0
    for t in folded:
        if t.quantizes:
            read = -(-t.n // choose_tiles(t, tokens, target).n_tile)
            moved += tokens * t.k * (read * (t.x_nbytes - 1) - t.x_nbytes - 1)
            weights = t.n * t.k * (1 + t.gated)
            sums_us = 2 * tokens * weights / (device.tflops * 1e6)
            plain_us = max(sums_us, weights / (device.tb_per_s * 1e6))
            extra_us += max(0.0, sums_us / QUANTIZING_RATE - plain_us)
            saved_us += LAUNCH_US
    return extra_us + moved / (L2_RATE * device.tb_per_s * 1e6) <= saved_us


def _is_exact(template: GemmTemplate) -> bool:
    return template.factor_nbytes == 4 and not template.tf32


def expected_us(template: GemmTemplate, tokens: int, target: str) -> tuple[float, float]:
    """Return the expected us of a GEMM by a template, and by the library with an epilogue
    kernel."""
    device, size, exact = device_class(target), template.item_nbytes, _is_exact(template)
    width = template.n * (1 + template.gated)
    rate = device.tflops_fp32 if exact else device.tflops * 2 / size
    sums_us = 2 * tokens * width * template.k / rate / 1e6
    moved = size * (
        width * template.k + tokens * (template.k + template.n * (1 + template.residual))
    )
    moved_us = moved / device.tb_per_s / 1e6
    template_us = max(sums_us / TEMPLATE_RATE[4 if exact else 2], moved_us)
    library_us = max(sums_us, moved_us)
    if template.activation != "none" or template.gated or template.residual:
        again = size * tokens * (2 * width + template.n * (1 + template.residual))
        library_us += LAUNCH_US + again / device.tb_per_s / 1e6
    return template_us, library_us


def gemm_job(
    template: GemmTemplate,
    target: str,
    schedule: GemmSchedule,
    divisible: Iterable[str] = STRIDES,
    unaligned: Iterable[str] = (),
) -> Job:
    """Return the job that compiles a GEMM; arguments as `gemm_arguments` lists them.

    divisible: strides that are multiples of 16; unaligned: pointers that are no multiples of 16
    bytes.
    """
    storage = f"*{POINTEES[template.dtype]}"
    kinds = {"storage": storage, "fp32": "*fp32", "i32": "*i32"}
    kinds["narrow"] = f"*{POINTEES[template.narrow or template.dtype]}"
    given = gemm_arguments(template, schedule)
    tiles = (("M_TILE", schedule.m_tile), ("N_TILE", schedule.n_tile), ("K_TILE", schedule.k_tile))
    apart = {"status_ptr", *unaligned}  # the first: one of many words
    multiples = {a for a, kind in given if kind != "size"} - apart | set(divisible)
    prefetch = print_prefetch(template, schedule, {"w_ptr", "w_row"} <= multiples)
    return Job(
        name=template.name,
        source=print_triton_gemm(template, schedule),
        target=target,
        signature=(
            *((a, kinds.get(kind, "i32")) for a, kind in given),
            *((tile, "constexpr") for tile, _ in tiles),
        ),
        constexprs=tiles,
        divisible=tuple(a for a, _ in given if a in multiples),
        num_warps=fit_warps(schedule.num_warps, target),
        num_stages=schedule.num_stages,
        before_wait="".join(f"{line}\n" for line in prefetch),
    )
