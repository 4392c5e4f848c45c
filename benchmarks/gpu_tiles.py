"""Tiles to time for the four products of a BERT-base layer, by bucket of tokens, on an sm_90.

In: a bucket, the sizes of a weight. Out: tags, those that should win first, the rule's last::

    candidates(64, 768, 3072)  ->  ["m64n32k128w4s5x5", "m64n16k128w4s5x2", ...]

Up to 256 tokens norms are folded, above they are stored: `template_of` says which GEMM is meant.
None spills for sm_90 with Triton 3.6, and all fit 224 KB of shared memory and a program's scratch.
"""

from __future__ import annotations

import torch

from turbotx.kernels.gemm_heuristics import MOST_FOLDED, choose_by_rule
from turbotx.kernels.triton.gemm_template import GemmTemplate
from turbotx.kernels.triton.tags import tag_of

# name: (n, k)
PRODUCTS = {"qkv": (2304, 768), "out": (768, 768), "up": (3072, 768), "down": (768, 3072)}
NAMES = {size: name for name, size in PRODUCTS.items()}
SWEPT = (16, 32, 64, 128, 256, 512, 1024, 4096)

# Up to 64 tokens one tile holds all of them: n x k, stages and parts are what there is to choose.
# About 2.2 MB in flight keep an H100's memory busy. "x1" spares the parts' meeting.
FEW = {
    "qkv": (
        "n32k128w4s5x1", "n16k128w4s5x1", "n32k256w4s4x1", "n32k128w4s7x1", "n32k128w4s4x1",
        "n32k64w4s8x1", "n32k64w4s4x1", "n32k128w4s4x2", "n64k128w4s4x2", "n64k64w4s5x3",
        "n32k128w8s5x1",
    ),
    "out": (
        "n16k256w4s4x1", "n16k128w4s5x2", "n32k64w4s4x4", "n16k128w4s7x1", "n16k256w8s4x1",
        "n32k128w4s3x3", "n32k64w4s7x2", "n32k256w4s4x1", "n64k64w4s3x6", "n16k64w4s4x3",
    ),
    "up": (
        "n32k128w4s5x1", "n32k128w4s6x1", "n32k256w4s4x1", "n16k128w4s5x1", "n32k128w4s4x1",
        "n32k64w4s8x1", "n32k64w4s4x1", "n64k128w4s4x2", "n64k128w4s5x1", "n32k128w8s5x1",
    ),
    "down": (
        "n32k128w4s5x5", "n16k128w4s5x2", "n32k256w4s3x4", "n32k128w4s4x4", "n32k128w4s6x5",
        "n16k256w4s4x2", "n16k256w4s5x2", "n64k128w4s4x8", "n64k64w4s6x10", "n16k128w4s8x1",
        "n32k256w4s4x3",
    ),
}  # fmt: skip
# 128 tokens: in one tile, or in two that read the weight from L2 in turn.
SOME = {
    "qkv": (
        "m128n32k128w4s4x1", "m128n32k128w4s5x1", "m128n32k64w4s6x1", "m64n64k128w4s4x1",
        "m64n64k64w4s6x1", "m128n16k128w4s5x1", "m128n64k128w8s4x1", "m64n32k128w4s4x1",
        "m64n64k256w4s3x1", "m128n32k64w8s6x1",
    ),
    "out": (
        "m128n16k128w4s5x1", "m64n16k256w4s4x1", "m64n32k128w4s5x2", "m128n32k64w4s5x4",
        "m64n32k64w4s4x2", "m64n32k256w4s4x1", "m128n16k128w4s4x2", "m64n64k64w4s4x4",
        "m128n32k64w8s4x4", "m64n16k128w4s7x1",
    ),
    "up": (
        "m128n32k128w4s4x1", "m128n32k128w4s5x1", "m128n32k64w4s6x1", "m64n64k128w4s4x1",
        "m64n64k64w4s6x1", "m128n64k64w8s5x1", "m128n64k128w8s4x1", "m64n32k128w4s4x1",
        "m64n64k256w4s3x1", "m128n32k64w8s6x1",
    ),
    "down": (
        "m128n32k128w4s5x4", "m128n32k128w8s5x4", "m64n32k128w4s5x2", "m64n32k256w4s4x2",
        "m64n64k128w4s4x5", "m128n16k128w4s5x2", "m128n64k64w8s5x5", "m64n16k256w4s4x1",
        "m64n64k128w4s5x4", "m128n32k64w4s6x4",
    ),
}  # fmt: skip
# From 256 tokens on tiles are reused from shared memory, and their size is what counts.
MANY = {
    256: (
        "m64n64k64w4s5x1", "m128n64k64w8s4x1", "m128n64k64w4s4x1", "m64n64k128w4s4x1",
        "m64n128k64w4s4x1", "m64n32k128w4s4x1",
    ),
    512: (
        "m128n64k64w4s4x1", "m64n128k64w4s4x1", "m128n128k64w8s4x1", "m64n64k64w4s5x1",
        "m128n64k128w8s4x1", "m128n128k64w8s3x1",
    ),
    1024: (
        "m128n128k64w8s3x1", "m64n256k64w8s4x1", "m128n64k64w4s5x1", "m256n64k64w8s4x1",
        "m128n128k128w8s3x1", "m64n128k64w4s5x1",
    ),
    4096: (
        "m128n128k64w8s3x1", "m64n256k64w8s4x1", "m256n64k64w8s4x1", "m128n128k128w8s3x1",
        "m64n256k64w8s3x1", "m128n64k64w4s5x1",
    ),
}  # fmt: skip
# 128 x 256 sums: a residual beside them spills 104 words of 8 warps, none of 16.
WIDE = {
    "qkv": ("m128n256k64w8s3x1", "m128n256k64w8s4x1", "m256n128k64w8s3x1"),
    "up": ("m128n256k64w8s3x1", "m128n256k64w8s4x1", "m256n128k64w8s3x1"),
    "out": ("m128n256k64w16s3x1", "m256n128k64w8s3x1"),
    "down": ("m128n256k64w16s3x1", "m128n256k64w16s4x1", "m256n128k64w8s3x1"),
}


def candidates(bucket: int, n: int, k: int) -> list[str]:
    """Return the tags to time; those of a weight that is none of BERT-base's are those of the
    product that is most like it."""
    name = NAMES.get((n, k)) or ("down" if k > 2 * n else "up" if n > 2 * k else "out")
    if bucket <= 64:
        listed = [f"m{max(16, bucket)}{tag}" for tag in FEW[name]]
    else:
        listed = list(SOME[name] if bucket == 128 else MANY[bucket])
        listed += WIDE.get(name, ()) if bucket >= 1024 else ()
    rule = choose_by_rule(template_of(bucket, n, k), bucket, "sm_90")
    own = tag_of(rule).partition("l")[0]
    return list(dict.fromkeys([*listed, own]))


def template_of(bucket: int, n: int, k: int) -> GemmTemplate:
    """Return the GEMM of a float16 layer that such a weight stands for."""
    folds = bucket <= MOST_FOLDED
    if n > k:
        activation = "gelu" if n > 3 * k else "none"
        norm = "layer" if folds else "none"
        return GemmTemplate(
            torch.float16, n, k, bias=True, activation=activation, norm=norm, scaled=folds
        )
    added = "layer" if folds else "none"
    return GemmTemplate(
        torch.float16, n, k, bias=True, residual=True, residual_norm=added, stats=folds
    )
