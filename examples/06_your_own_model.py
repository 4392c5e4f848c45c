# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
"""
# Your own model

What turbotx does with an operation that it has never heard of, how it says so, how one line teaches
it, and how to read the other reasons that a report may give.
"""

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

import turbotx
from turbotx.ops.table import pointwise

# %% [markdown]
"""
## An operation of your own

A custom operator: to PyTorch, and to turbotx, a name with an implementation behind it.
"""


# %%
@torch.library.custom_op("mine::squash", mutates_args=())
def squash(x: torch.Tensor, scale: float) -> torch.Tensor:
    return x / (1 + (x * scale).abs())


@squash.register_fake
def _(x: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.empty_like(x)


class Gate(nn.Module):
    def __init__(self, width=256):
        super().__init__()
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x + squash(self.left(x), 0.5) * torch.sigmoid(self.right(x)))


torch.manual_seed(0)
model, x = Gate().eval(), torch.randn(4, 32, 256)

# %% [markdown]
"""
## Nothing is silent

The model works at once: the unknown operation runs through PyTorch, in planned memory, between the
generated kernels. The report lists it, with the reason.
"""

# %%
unknown = turbotx.explain(model, x)
for extern in unknown.externs:
    print(f"{extern.op} ({extern.count} x): {extern.reason}")
unknown

# %% [markdown]
"""
## One row

A row of the op table says what *one element* of the result is. There is nothing to write for C++,
for Triton, for a dtype or for a shape; `docs/adding-an-op.md` has the other kinds of rows.
"""

# %%
pointwise("mine.squash.default", lambda m, x, scale: x / (1 + m.call("abs", x * scale)))

known = turbotx.explain(model, x)
assert not known.externs
print(known.kernels[-1].signature)

# %% [markdown]
"""
## What it brings

The operation is part of the kernel now: fewer launches, and less traffic between them.
"""

# %%
names = ("PyTorch", "op unknown", "op known")
launches = (known.eager.launches, len(unknown.launches), len(known.launches))
moved = []
for report in (unknown, known):
    between = [x.traffic.compulsory_nbytes for x in report.launches if x.kind != "gemm"]
    moved.append(sum(between) / 1e6)

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.4))
left.barh(names[::-1], launches[::-1], color="#4f8fd9")
left.set(xlabel="launches")
right.barh(names[:0:-1], moved[::-1], color="#e8a33d")
right.set(xlabel="MB moved between matrix products")
figure.tight_layout()
plt.show()

# %% [markdown]
"""
## Reading refusals

Some things cannot be one kernel. Here a softmax along rows is summed along columns: no program can
have a column's sum before all of its rows are done. The report says which operation, and why.
"""


# %%
def over_both_axes(x):
    return torch.softmax(x, -1).sum(0)


split = turbotx.explain(over_both_axes, torch.randn(64, 100))
(region,) = split.regions
print(region.kernels)
print(region.reason)

# %% [markdown]
"""
Some calls cannot be captured at all. The error names the line of your source, and what to do.
"""


# %%
def picks(x):
    return x[x > 0]  # how many there are, only the values tell


try:
    turbotx.optimize(picks)(torch.ones(3))
except turbotx.TurbotxError as error:
    refusal = str(error)
print(refusal[:400])

# %% [markdown]
"""
And training is refused before it can go wrong quietly.
"""

# %%
try:
    turbotx.optimize(Gate())(x)
except turbotx.TurbotxError as error:
    print(error)

# %%
fast = turbotx.optimize(model)
with torch.no_grad():
    assert torch.allclose(fast(x), model(x), atol=1e-5)
assert [e.count for e in unknown.externs] == [1, 1] and "squash" in unknown.externs[1].op
assert launches[0] > launches[1] > launches[2] and moved[1] < moved[0]
assert len(region.kernels) == 2 and region.reason
assert "picks" in refusal or "line" in refusal
