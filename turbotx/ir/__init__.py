"""The vocabulary of everything after partition: kernels, the launches they make, and sizes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turbotx.ir.kernel import (
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
    from turbotx.ir.launch import Launch, Operand, Tensor

__all__ = [
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
    "axis_symbol",
    "needs_of",
    "phase_of",
    "rename",
    "results_of",
    "value_symbol",
    "values_in",
    "Tensor",
    "Operand",
    "Launch",
]

# Imported at their first use: what runs a saved model needs no symbolic algebra.
_OF_LAUNCHES = ("Launch", "Operand", "Tensor")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'turbotx.ir' has no attribute {name!r}")
    module = import_module(f"turbotx.ir.{'launch' if name in _OF_LAUNCHES else 'kernel'}")
    found = globals()[name] = getattr(module, name)
    return found
