"""Tiles of GEMMs as data: what was measured on a class of devices, and what is expected there.

In: a class of devices, a bucket of tokens, the sizes of a weight. Out: a tag, or None where neither
table knows the GEMM, and a rule decides::

    known_tiles("sm_90", 64, 768, 3072)  ->  "m64n32k128w4s5x5"

The tables are of 16-bit GEMMs whose weight is stored (n, k), whatever is done to the sums;
`MEASURED_TILES` is asked first. What a tag does not name is the rule's.
"""

from __future__ import annotations

# (bucket of tokens, n, k), and (bucket, n, k, True) of a gated weight, which has 2 n rows.
Key = tuple[int, int, int] | tuple[int, int, int, bool]
Table = dict[str, dict[Key, str]]

# Each row: device, microseconds before and after, how it was measured.
MEASURED_TILES: Table = {
    "sm_90": {},
}

# Expected, not measured: BERT-base's four products. H100: 3.35 TB/s x about 0.65 us is 2.2 MB that
# must be in flight, which tiles of 64 steps of k in four stages are not (0.9 MB on QKV's 72 thread
# blocks). QKV and up: 72 and 96 blocks of 32 KB each in flight. O: all of its 1.2 MB on 48 blocks,
# without sums in parts, whose meeting costs about a microsecond. Down: 24 tiles in 5 parts are 120
# blocks, one a processor.
EXPECTED_TILES: Table = {
    "sm_90": {
        (16, 2304, 768): "m16n32k128w4s5x1",
        (16, 768, 768): "m16n16k256w4s4x1",
        (16, 3072, 768): "m16n32k128w4s5x1",
        (16, 768, 3072): "m16n32k128w4s5x5",
        (32, 2304, 768): "m32n32k128w4s6x1",
        (32, 768, 768): "m32n16k256w4s4x1",
        (32, 3072, 768): "m32n32k128w4s6x1",
        (32, 768, 3072): "m32n32k128w4s5x5",
        (64, 2304, 768): "m64n32k128w4s5x1",
        (64, 768, 768): "m64n16k256w4s4x1",
        (64, 3072, 768): "m64n32k128w4s5x1",
        (64, 768, 3072): "m64n32k128w4s5x5",
    },
}


def known_tiles(device: str, bucket: int, n: int, k: int, gated: bool = False) -> str | None:
    """Return the tag that a table has for a 16-bit GEMM; None: none has."""
    key: Key = (bucket, n, k, True) if gated else (bucket, n, k)
    measured = MEASURED_TILES.get(device, {}).get(key)
    return measured or EXPECTED_TILES.get(device, {}).get(key)
