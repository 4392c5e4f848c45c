"""The types used after partition: kernels, launches and sizes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turbotx.ir.expert_launches import GroupedGemmLaunch, RouteLaunch
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
        axes_along,
        axes_in,
        axes_of,
        axis_symbol,
        expressions_of,
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
    "axes_along",
    "axes_in",
    "axes_of",
    "axis_symbol",
    "expressions_of",
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
    "GroupedGemmLaunch",
    "Int8Operands",
    "KernelLaunch",
    "Launch",
    "NormOperands",
    "Operand",
    "ProductLaunch",
    "RouteLaunch",
    "SequenceLaunch",
    "Tensor",
]


_MODULES = ("turbotx.ir.kernel", "turbotx.ir.launch", "turbotx.ir.expert_launches")


# Imported on first use: a saved model runs without sympy.
def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'turbotx.ir' has no attribute {name!r}")
    for module in map(import_module, _MODULES):
        if hasattr(module, name):
            found = globals()[name] = getattr(module, name)
            return found
    raise AssertionError(f"{name} is in none of {_MODULES}")
