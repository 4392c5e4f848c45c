"""Sequences: kernel parameters of ops that reduce over the tokens of each sequence.

In: a node of `ir.packed_ops` and its launch. Out: a launch with the kernel that GPUs use::

    sequence_sum(x (1, tokens, 384), bounds, 1)
      ->  SequenceKernel("sum", float16, float16), (sequences, 1, tokens, 384)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from turbotx import ir
from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import product
from turbotx.ir.matmul_kernels import SequenceKernel
from turbotx.ir.packed_ops import sequence_cumsum, sequence_max, sequence_sum, sequence_token

SEQUENCE_OPS: dict[Any, str] = {
    sequence_sum: "sum", sequence_max: "max", sequence_cumsum: "cumsum", sequence_token: "first",
}  # fmt: skip
"""The operation on each sequence; "first" also stands for the last token."""


def make_launch(node: fx.Node, call: ir.AtenCall, place: Mapping[str, Any]) -> ir.AtenLaunch:
    """Return the launch of a call that PyTorch runs. For a sequence op it includes the GPU kernel,
    unless there is none for its dtype."""
    which = SEQUENCE_OPS.get(node.target)
    if which is None:
        return ir.AtenLaunch(call, **place)
    x, bounds, dim = g.operand(node, 0), g.operand(node, 1), node.args[2]
    dtype, out, shape = g.dtype(x), g.dtype(node), g.shape(x)
    if dtype.is_complex or (which == "cumsum" and (dtype.is_floating_point or out != torch.int64)):
        return ir.AtenLaunch(call, **place)
    if which == "first" and node.args[3]:
        which = "last"
    assert isinstance(dim, int)
    at = dim % len(shape)
    extents = (g.shape(bounds)[0] - 1, product(shape[:at]), shape[at], product(shape[at + 1 :]))
    return ir.SequenceLaunch(call, SequenceKernel(which, dtype, out), extents, **place)
