"""Device classes: properties of a class of GPUs that tile choices depend on.

In: a target. Out: its `DeviceClass`, or that of the next older class::

    device_class("sm_90").processors  ->  132
"""

from __future__ import annotations

from dataclasses import dataclass

from turbotx.kernels.heuristics import class_name
from turbotx.kernels.triton.gemm_template import GemmTemplate


@dataclass(frozen=True)
class DeviceClass:
    """Properties of a class of GPUs.

    processors: multiprocessors. shared_nbytes: per program. stages: useful pipeline stages. widest:
    the largest m and n tile whose float32 sums stay in registers with 8 warps. tflops, tflops_fp32,
    tb_per_s: dense 16-bit products, float32 products, memory. in_flight_nbytes: loads that must be
    in flight to saturate memory; 0: as many as the stages hold. few_tokens: up to here the library
    is never faster. most_folded: up to here norms are folded; 0: decided by expected times.
    """

    processors: int
    shared_nbytes: int
    stages: int
    widest: tuple[int, int] = (128, 128)
    tflops: float = 300.0
    tflops_fp32: float = 19.0
    tb_per_s: float = 2.0
    in_flight_nbytes: int = 0
    few_tokens: int = 64
    most_folded: int = 0

    def widest_of(self, template: GemmTemplate) -> tuple[int, int]:
        """Return the largest m and n tile for a template."""
        # int8, H200 at 4096 x 768 x 3072: 128 x 128 reach 990 TFLOP/s with two programs on a
        # multiprocessor, 128 x 256 at k = 768 reach 540. fp8 keeps two sets of
        # sums in registers, since sm_90 rounds one: 128 x 256 spilled 192 words.
        return self.widest if template.kind == "none" else (128, 128)


# From the vendors' data sheets: A100, H100 SXM, B200, MI300X. In flight: bandwidth times an assumed
# latency of 650 ns.
DEVICES = {
    "sm_80": DeviceClass(108, 160 * 1024, 4, tflops=312.0, tflops_fp32=19.5, tb_per_s=2.0),
    # H200, BERT-base float16, whole calls in us: 192 tokens 367 by templates and 462 by cuBLAS, 384
    # the same by either; norms folded and stored 312 and 321 at 128 tokens, 382 and 367 at 192.
    "sm_90": DeviceClass(132, 224 * 1024, 4, (128, 256), 990.0, 67.0, 3.35, 2_200_000, 256, 128),
    "sm_100": DeviceClass(148, 224 * 1024, 4, (128, 256), 2250.0, 75.0, 8.0),
    "gfx942": DeviceClass(304, 64 * 1024, 2, tflops=1307.0, tflops_fp32=163.0, tb_per_s=5.3),
}


def device_class(target: str) -> DeviceClass:
    """Return the properties of a target's class."""
    return DEVICES[class_name(target)]
