"""GEMM roles: what else GEMM launches may do, by options and target.

In: options and a target. Out: which of epilogues, library fallbacks and prologues the pipeline
looks for, for example::

    GemmRoles.of(Options(), "sm_90")  ->  epilogues, fallbacks and norms
"""

from __future__ import annotations

from dataclasses import dataclass

from turbotx.options import Options


@dataclass(frozen=True)
class GemmRoles:
    """What GEMM launches may do besides the product.

    epilogues: compute the following region before storing.
    fallbacks: can also run as a library GEMM followed by kernels.
    norms, rows: normalise, or quantise, their input while reading it.
    """

    epilogues: bool
    fallbacks: bool
    norms: bool
    rows: bool

    @classmethod
    def of(cls, options: Options, target: str, quantized: bool = False) -> GemmRoles:
        """Return what the options allow on a target. quantized: some products are of integers."""
        generated = target != "cpu" and options.backend != "aten" and options.gemms != "cublas"
        # PyTorch runs products whose weights are not packed, and would run their epilogues too.
        epilogues = options.epilogues and (generated or (target == "cpu" and options.pack_weights))
        # The kernels that normalise rows of int8 products also quantise them.
        rows = generated and epilogues and quantized
        norms = generated and epilogues and options.norms != "store" and not rows
        return cls(epilogues, generated, norms, rows)
