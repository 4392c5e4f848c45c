"""The op table: importing this package registers every row (see `ops.table`)."""

from turbotx.ops import indexing, pointwise, quantized, reductions
from turbotx.ops.fallback_ops import takes_any_layout, why_outside
from turbotx.ops.table import OF_NUMBERS, OPS, Row, is_computed

__all__ = [
    "OF_NUMBERS", "OPS", "Row", "indexing", "is_computed", "pointwise", "quantized",
    "reductions", "takes_any_layout", "why_outside",
]  # fmt: skip
