"""Saved: an optimized model as one file, and back without capture, compiler or symbolic algebra.

In: something that `turbotx.optimize` made and called. Out: a file, and from it a module that
answers the same calls at any sizes, bit for bit::

    turbotx.save(fast, "model.ttx")
    fast = turbotx.load("model.ttx")        # in another process, or on another machine
"""

from turbotx.saved.load import SavedModule, load

__all__ = ["SavedModule", "load"]
