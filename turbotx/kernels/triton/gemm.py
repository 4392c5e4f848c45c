"""Print a GEMM as Triton, with normalized input, epilogue and row statistics.

In: a `GemmTemplate`, the properties fixed by the graph, and a `GemmSchedule`. Out: stand-alone
source of one function; rows are tokens, the weight is (n, k)::

    out = activation(norm(x) w^T + bias) [* the same of the second half of w] + [norm of] residual

The function is that of templates/gemm.py, specialized. A norm is folded: LN(x) W = rstd * (x (gamma
W) - mean * sums) + beta W + bias, where sums are those of gamma W over k, as it is stored (see
`folded_weights.py`), so that its rounding cancels with the mean. float32 subtracts the mean from x
instead, which rounds as LayerNorm itself does. A residual is normalized as it is loaded. mean and
rstd come from statistics stored by the previous GEMM.
"""

from __future__ import annotations

import torch

from turbotx.ir.quantized_ops import LEVELS
from turbotx.kernels.schedule import power_above
from turbotx.kernels.triton.functions import stand_alone
from turbotx.kernels.triton.gemm_template import GemmSchedule, GemmTemplate, gemm_arguments
from turbotx.kernels.triton.reduce import TYPES
from turbotx.kernels.triton.specialize import Flag, specialize
from turbotx.kernels.triton.statistics import RowStatistics

# Registers per thread for partial sums and statistics that are loaded at once.
MOST_HELD = 160
# fp8 products that sm_90 may accumulate with reduced precision before adding to float32 sums.
MOST_IMPRECISE = 128
# Sums per thread up to which other operands are kept in registers too.
FEW_SUMS = 32


def print_triton_gemm(template: GemmTemplate, schedule: GemmSchedule) -> str:
    """Return the Triton source of a GEMM."""
    arguments = [a for a, _ in gemm_arguments(template, schedule)]
    arguments += ["M_TILE", "N_TILE", "K_TILE"]
    flags = _flags(template, schedule)
    main = specialize("gemm", "gemm", template.name, arguments, flags)
    return stand_alone(_header(template, schedule), main)


def _header(t: GemmTemplate, s: GemmSchedule) -> list[str]:
    x = {"none": "x", "layer": "layer_norm(x)", "rms": "rms_norm(x)"}[t.norm]
    x = "x_scale * scales * x" if t.kind != "none" else x
    x = f"scales * {x}" if t.float_rows else x
    x = x.replace("* x", "* quantized(x)") if t.quantizes else x
    inner = f"{x} w^T" + " + bias" * t.bias
    formula = inner if t.activation == "none" else f"{t.activation}({inner})"
    residual = {"none": "residual"}.get(t.residual_norm, f"{t.residual_norm}_norm(residual)")
    formula += " * (second half of w)" * t.gated + f" + {residual}" * t.residual
    split = f", k in {s.splits} parts" if s.splits > 1 else ""
    return [
        t.name,
        f"  out = {formula}, w {t.n * (1 + t.gated)} x {t.k}"
        + ", with statistics" * t.stats
        + f", one for each of {t.experts} experts" * (t.experts > 0),
        f"  tiles of {s.m_tile} x {s.n_tile}, {s.k_tile} at a time{split},"
        f" {s.num_warps} warps, {s.num_stages} stages",
    ]


def _flags(t: GemmTemplate, s: GemmSchedule) -> dict[str, Flag]:
    sums = s.m_tile * s.n_tile * (1 + t.gated)
    x = RowStatistics(t.norm, t.k, s.stat_tile or t.k, t.eps, s.m_tile)
    added = RowStatistics(t.residual_norm, t.n, s.residual_tile or t.n, t.residual_eps, s.m_tile)
    late = bool(s.late) and sums <= FEW_SUMS * 32 * s.num_warps
    # the sums may need x's mean
    x_waits = late and not t.centered and x.can_wait(s.num_warps)
    added_waits = late and added.can_wait(s.num_warps)
    # All parts are loaded at once if registers allow: one after the other they took half of a
    # launch (BERT-base's 768 x 3072 at 40 tokens, H200: 2.4 of 5.6 us).
    held = sums * s.splits
    held += (2 * s.m_tile * x.step) * x_waits
    held += (2 * s.m_tile * added.step) * (added.norm != "none")
    asked = t.bias or t.scaled or t.narrow is not None or t.residual or t.norm != "none"
    precision = "tf32" if t.tf32 else "ieee"
    return {
        "N": t.n,
        "K": t.k,
        "STORED": TYPES[t.dtype],
        "NARROW": t.kind,
        "LEVELS": 1.0 if t.narrow is None else LEVELS.get(t.narrow, 1.0),
        "QUANTIZES": t.quantizes,
        "WIDENED": t.widened,
        "IMPRECISE": min(MOST_IMPRECISE, s.k_tile),
        "UNPACKED": t.float_rows and not t.group,
        "GROUP_SIZE": t.group,
        "GROUPS": -(-t.k // t.group) if t.group else 0,
        "SHIFTED": t.shifted,
        "SUMS": "tl.int32" if t.kind == "int8" else "tl.float32",
        "PRECISION": precision if t.dtype is torch.float32 else None,
        "N_TILES": -(-t.n // s.n_tile),
        "N_MASKED": t.n % s.n_tile != 0,
        "K_MASKED": t.k % s.k_tile != 0,
        "SPLITS": s.splits,
        "STEPS": -(-t.k // s.k_tile),
        "UNROLLED": held <= MOST_HELD * 32 * s.num_warps,
        "FLIPPED": t.flipped,
        "EXPERTS": t.experts,
        "EXPERT_SLOTS": power_above(t.experts + 1),
        "EXPERT_STEP": t.expert_step,
        "GATED": t.gated,
        "HAS_BIAS": t.bias,
        "ACTIVATION": t.activation,
        "LIGHT_GELU": t.light_gelu,
        "SCALED": t.scaled or (t.float_rows and not t.group),
        "HAS_RESIDUAL": t.residual,
        "HAS_STATS": t.stats,
        "HAS_PEAKS": t.peaks,
        "LATE": late and asked,
        "CENTERED": t.centered,
        **x.flags("X", x_waits),
        **added.flags("RESIDUAL", added_waits),
    }
