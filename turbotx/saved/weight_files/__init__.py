"""Loads weights from files into a model: safetensors, PyTorch state dicts, `.npz`; all or nothing.

In: a model and a path. Out: the model's own parameters with the file's values::

    turbotx.load_weights(model, "bert.npz")     # also TurboTransformers' packed layout
"""

from turbotx.saved.weight_files.load import load_weights

__all__ = ["load_weights"]
