"""The vocabulary of everything after partition: kernels, the launches they make, and sizes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turbotx.ir.kernel import (
        PARALLEL,
        REDUCTION,
        Access,
        Axis,
        Check,
        Compute,
        Constant,
        Index,
        Kernel,
        Load,
        Param,
        Reduce,
        Scan,
        Statement,
        Store,
        axis_symbol,
        needs_of,
        phase_of,
        rename,
        results_of,
        value_symbol,
        values_in,
    )
    from turbotx.ir.launch import (
        AtenCall,
        AtenLaunch,
        AttentionLaunch,
        GemmFallback,
        GemmLaunch,
        Int8Operands,
        KernelLaunch,
        Launch,
        NormOperands,
        Operand,
        ProductLaunch,
        SequenceLaunch,
        StoreLaunch,
        Tensor,
    )

__all__ = [
    "PARALLEL",
    "REDUCTION",
    "Access",
    "Axis",
    "Check",
    "Compute",
    "Constant",
    "Index",
    "Kernel",
    "Load",
    "Param",
    "Reduce",
    "Scan",
    "Statement",
    "Store",
    "StoreLaunch",
    "axis_symbol",
    "needs_of",
    "phase_of",
    "rename",
    "results_of",
    "value_symbol",
    "values_in",
    "AtenCall",
    "AtenLaunch",
    "AttentionLaunch",
    "GemmFallback",
    "GemmLaunch",
    "Int8Operands",
    "KernelLaunch",
    "Launch",
    "NormOperands",
    "Operand",
    "ProductLaunch",
    "SequenceLaunch",
    "Tensor",
]


# Imported at their first use: what runs a saved model needs no symbolic algebra.
def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'turbotx.ir' has no attribute {name!r}")
    found = getattr(import_module("turbotx.ir.kernel"), name, None)
    found = globals()[name] = found or getattr(import_module("turbotx.ir.launch"), name)
    return found
