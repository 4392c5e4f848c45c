"""Device classes: the numbers of a kind of GPU that choices of tiles depend on.

In: a target. Out: its `DeviceClass`, or that of the next older kind::

    device_class("sm_90").processors  ->  132
"""

from __future__ import annotations

from dataclasses import dataclass

from turbotx.kernels.triton.gemm_template import GemmTemplate


@dataclass(frozen=True)
class DeviceClass:
    """What the choice of tiles depends on: processors, shared memory for one program, stages that
    pay. widest: the largest m and n tile whose float32 sums stay in registers, with 8 warps.
    tflops, tflops_fp32, tb_per_s: dense 16-bit products, ordinary float32 ones, memory.
    in_flight_nbytes: what must be on its way to keep memory busy; 0: what those stages hold.
    few_tokens: up to here a library has nothing to win. most_folded: up to here norms are folded;
    0: expected times decide."""

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
        """Return the largest m and n tile of a template's sums."""
        # int8, H200 at 4096 x 768 x 3072: 128 x 128 reach 990 TFLOP/s where two programs share a
        # processor, 128 x 256 at k = 768 reach 540. Of fp8 there are two sets of sums in registers,
        # of which sm_90 rounds one: 128 x 256 spilled 192 words.
        return self.widest if template.kind == "none" else (128, 128)


# From the vendors' data sheets: A100, H100 SXM, B200, MI300X. In flight: bandwidth times a latency
# of 650 ns, which is assumed.
DEVICES = {
    "sm_80": DeviceClass(108, 160 * 1024, 4, tflops=312.0, tflops_fp32=19.5, tb_per_s=2.0),
    # H200, BERT-base float16, whole calls in us: 192 tokens 367 by templates and 462 by cuBLAS, 384
    # the same by either; norms folded and stored 312 and 321 at 128 tokens, 382 and 367 at 192.
    "sm_90": DeviceClass(132, 224 * 1024, 4, (128, 256), 990.0, 67.0, 3.35, 2_200_000, 256, 128),
    "sm_100": DeviceClass(148, 224 * 1024, 4, (128, 256), 2250.0, 75.0, 8.0),
    "gfx942": DeviceClass(304, 64 * 1024, 2, tflops=1307.0, tflops_fp32=163.0, tb_per_s=5.3),
}


def class_name(target: str) -> str:
    """Return the class of a target; an NVIDIA GPU of another kind counts as the next older one."""
    if target in DEVICES:
        return target
    number = int(target.removeprefix("sm_")) if target.removeprefix("sm_").isdigit() else 0
    older = [n for n in DEVICES if n.startswith("sm_") and int(n[3:]) <= number]
    return older[-1] if older else "sm_80"


def device_class(target: str) -> DeviceClass:
    """Return the numbers of a target's class."""
    return DEVICES[class_name(target)]
