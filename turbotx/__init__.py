"""turbotx: a Triton-language kernel compiler and torch.fx rewriter for transformer inference.

In: a PyTorch transformer. Out: one that runs faster, for any batch size and sequence length::

    fast = turbotx.optimize(model)
    fast(input_ids=ids, attention_mask=mask)
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from turbotx.engine.logs import read_logs
from turbotx.engine.observers import observers
from turbotx.errors import TurbotxError
from turbotx.kernels.openmp import end_threads

if TYPE_CHECKING:
    from turbotx.engine.drop_in import OptimizedModule
    from turbotx.engine.optimize import optimize
    from turbotx.report import explain
    from turbotx.saved.load import load
    from turbotx.saved.save import save
    from turbotx.saved.weight_files import load_weights

__version__ = "0.1.0"
__all__ = [
    "OptimizedModule",
    "TurbotxError",
    "__version__",
    "explain",
    "load",
    "load_weights",
    "optimize",
    "save",
]

# Imported at their first use: a process that only loads a saved model needs no tracing and no
# symbolic algebra, whose imports take longer than all else that it does.
_PLACES = {
    "OptimizedModule": "turbotx.engine.drop_in",
    "explain": "turbotx.report",
    "load": "turbotx.saved.load",
    "load_weights": "turbotx.saved.weight_files",
    "optimize": "turbotx.engine.optimize",
    "save": "turbotx.saved.save",
}


def __getattr__(name: str) -> Any:
    if name == "dynamo":
        return import_module("turbotx.engine.dynamo")
    if name not in _PLACES:
        raise AttributeError(f"module 'turbotx' has no attribute {name!r}")
    read_logs()
    found = globals()[name] = getattr(import_module(_PLACES[name]), name)
    return found


def _debug(*call: Any) -> Any:
    """Look at a call that is compiled, where TURBOTX_DUMP or TURBOTX_VERIFY asks for it."""
    if any(os.environ.get(name) for name in ("TURBOTX_DUMP", "TURBOTX_VERIFY")):
        return import_module("turbotx.report.debug").watch(*call)
    return lambda compiled: None


observers.append(_debug)
os.register_at_fork(before=end_threads)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
