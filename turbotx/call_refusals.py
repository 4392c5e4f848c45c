"""Call refusals: what a call brings that no program takes, said in the user's words.

In: a call's tensor, or the state of PyTorch that it is made in. Out: nothing, or the error::

    refuse_tensor(torch.ones(2, device="meta"))  ->  InputError: an input is on meta, and ...
"""

from __future__ import annotations

import torch

from turbotx.ambient import Ambient, unknown_modes
from turbotx.errors import InputError, TrainingError


def refuse_tensor(tensor: torch.Tensor) -> None:
    if tensor.device.type not in ("cpu", "cuda"):
        raise InputError(
            f"an input is on {tensor.device}, and turbotx runs on CPUs and NVIDIA GPUs: move the "
            'model and its inputs with .to("cpu") or .to("cuda")'
        )
    if tensor.layout is not torch.strided:
        raise InputError(f"an input has layout {tensor.layout}; turbotx takes dense tensors only")
    if tensor.requires_grad and torch.is_grad_enabled():
        refuse_gradient()


def refuse_modes(ambient: Ambient) -> None:
    """A program is not PyTorch's functions: nothing would intercept them."""
    names = unknown_modes(ambient)
    if names:
        raise InputError(
            f"the call is made under {', '.join(names)}, which intercepts PyTorch's functions, and "
            "a compiled program does not call them: leave the mode around the call, or call the "
            "model that was given to turbotx.optimize"
        )


def refuse_gradient() -> None:
    raise TrainingError(
        "an input requires grad, and turbotx is for inference only: call it under "
        "torch.no_grad(), or pass input.detach()"
    )
