"""turbotx: a Triton-language kernel compiler and torch.fx rewriter for transformer inference.

In: a PyTorch transformer. Out: one that runs faster, for any batch size and sequence length::

    fast = turbotx.optimize(model)
    fast(input_ids=ids, attention_mask=mask)
"""

from turbotx.errors import TurbotxError
from turbotx.optimize import optimize
from turbotx.report import explain
from turbotx.weight_files import load_weights

__version__ = "0.1.0"
__all__ = ["TurbotxError", "__version__", "explain", "load_weights", "optimize"]
