"""turbotx: a Triton-language kernel compiler and torch.fx rewriter for transformer inference."""

__version__ = "0.1.0"
