"""Saved models: an optimized model as one file, loaded without capture, compiler or sympy.

In: an object that `turbotx.optimize` made and that was called. Out: a file, and from it a module
that serves the same calls at any sizes, bitwise equal::

    turbotx.save(fast, "model.ttx")
    fast = turbotx.load("model.ttx")        # in another process, or on another machine
"""

from turbotx.saved.load import SavedModule, load

__all__ = ["SavedModule", "load"]
