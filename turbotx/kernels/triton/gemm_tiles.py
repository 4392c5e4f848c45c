"""Tables of GEMM tiles: measured and expected ones by device class.

In: a device class, a token bucket, the sizes of a weight. Out: a tag, or None if neither table has
the GEMM, for which a rule is used::

    known_tiles("sm_90", 64, 768, 3072)  ->  "m64n32k128w4s5x5"

The tables are for 16-bit GEMMs with a weight stored (n, k) and any epilogue; `MEASURED_TILES` takes
precedence. Fields missing in a tag come from the rule.
"""

from __future__ import annotations

# Keys: (token bucket, n, k), and (bucket, n, k, True) for a gated weight with 2 n rows.
Key = tuple[int, int, int] | tuple[int, int, int, bool]
Table = dict[str, dict[Key, str]]

# H200, BERT-base float16, bare replays of the whole call, dependent launches, one change at a time
# (`python benchmarks/gpu.py tiles`), in us. 40 tokens, 248: 268 to 277 with 64 steps of k, 3 or 4
# stages or twice the parts for QKV and up, 265 to 304 for the others of down. 16 tokens, 207: 211
# to 234. 128 tokens, norms folded: 397 -> 312. 192, stored: 466 -> 367. 384 and 1024: 543 -> 529,
# 640 -> 609. 4096: up alone 48.9 -> 40.6.
MEASURED_TILES: Table = {
    "sm_90": {
        (16, 2304, 768): "m16n32k128w4s5x1",
        (16, 768, 768): "m16n16k128w4s5x1",
        (16, 3072, 768): "m16n32k128w4s5x1",
        (16, 768, 3072): "m16n32k128w4s5x5",
        (64, 2304, 768): "m64n32k128w4s5x1",
        (64, 768, 768): "m64n16k128w4s5x1",
        (64, 3072, 768): "m64n32k128w4s5x1",
        (64, 768, 3072): "m64n32k128w4s5x5",
        (128, 2304, 768): "m64n64k64w4s5x1",
        (128, 768, 768): "m64n32k64w4s5x1",
        (128, 3072, 768): "m64n64k64w4s5x1",
        (128, 768, 3072): "m64n64k64w4s5x4",
        (256, 2304, 768): "m64n64k64w4s5x1",
        (256, 768, 768): "m64n32k64w4s5x1",
        (256, 3072, 768): "m64n64k64w4s5x1",
        (256, 768, 3072): "m64n64k64w4s5x2",
        (512, 3072, 768): "m128n128k64w8s3x1",
        (1024, 3072, 768): "m128n128k64w8s3x1",
        (4096, 3072, 768): "m128n256k64w8s3x1",
    },
}

# Interpolated between measured buckets.
EXPECTED_TILES: Table = {
    "sm_90": {
        (32, 2304, 768): "m32n32k128w4s6x1",
        (32, 768, 768): "m32n16k128w4s5x1",
        (32, 3072, 768): "m32n32k128w4s6x1",
        (32, 768, 3072): "m32n32k128w4s5x5",
    },
}


def known_tiles(device: str, bucket: int, n: int, k: int, gated: bool = False) -> str | None:
    """Return the tables' tag for a 16-bit GEMM, or None."""
    key: Key = (bucket, n, k, True) if gated else (bucket, n, k)
    measured = MEASURED_TILES.get(device, {}).get(key)
    return measured or EXPECTED_TILES.get(device, {}).get(key)
