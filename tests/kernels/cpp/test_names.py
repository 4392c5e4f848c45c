"""Names of a user's parameters in kernels: whatever they are called, what is printed compiles.

In: modules whose parameters are called like keywords, macros, loops and sizes. Out: eager's values.
"""

from __future__ import annotations

import torch
from torch import nn

import turbotx
from tests.kernels.cpp.cpp_probe import needs_compiler

NAMES = (
    "mutable", "requires", "int", "for", "None", "row", "col", "batch", "seq", "ttx", "std", "NAN",
    "errno", "args", "mul", "add", "x", "x1", "x1_", "row_", "begin", "k", "µ", "b-c", "1",
)  # fmt: skip


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for k, name in enumerate(NAMES):
            self.register_buffer(name, torch.full((4,), 1 + k / 8))
        self.listed = nn.ParameterList([torch.full((4,), 0.5), torch.full((4,), 0.25)])
        self.by_name = nn.ParameterDict({"for": torch.ones(4), "2": torch.ones(4) * 3})

    def forward(self, x):
        for tensor in (*self._buffers.values(), *self.listed, *self.by_name.values()):
            x = torch.tanh(x * tensor + 0.1)
        return x, x.softmax(-1)


@needs_compiler
def test_any_name_of_a_parameter(tmp_path) -> None:
    model, x = Named().eval(), torch.randn(2, 3, 4)
    fast = turbotx.optimize(model)
    torch.testing.assert_close(fast(x), model(x))
    turbotx.save(fast, tmp_path / "named.ttx")
    torch.testing.assert_close(turbotx.load(tmp_path / "named.ttx")(x), model(x))
    model.get_parameter("listed.1").data.mul_(2)  # the user's own, whatever a graph calls it
    torch.testing.assert_close(fast(x), model(x))
