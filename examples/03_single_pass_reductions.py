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
# Reductions in a single pass

Layer normalization needs a mean and a variance, softmax a maximum and a sum. Computed one after
the other, each is a pass over memory. Computed together they are one pass; but the well-known
formula for that loses all its digits where a mean is large. Here is what turbotx does, in numbers.
"""

# %%
import matplotlib.pyplot as plt
import torch

import turbotx

# %% [markdown]
"""
## Three ways to a variance

The obvious way subtracts the mean and takes a second pass. E[x²] − E[x]² takes one pass and
cancels. The third way carries a count, a mean and a sum of squared deviations, and joins two of
these triples exactly: one pass, and no cancellation.
"""


# %%
def two_passes(x):
    return (x - x.mean(-1, keepdim=True)).square().mean(-1)


def cancelling(x):
    return x.square().mean(-1) - x.mean(-1).square()


@turbotx.optimize
def fused(x):
    return torch.var(x, -1, correction=0)


# %% [markdown]
"""
## Error over the mean

Rows of 768 numbers with standard deviation 1 and a growing mean, in float32, against the variance
of the same numbers in float64.
"""

# %%
torch.manual_seed(0)
means = torch.logspace(0, 6, 25)
ways = {"two passes": two_passes, "E[x²] − E[x]²": cancelling, "turbotx, one pass": fused}
errors = {name: [] for name in ways}
for mean in means:
    x = torch.randn(64, 768) + mean
    exact = torch.var(x.double(), -1, correction=0)
    for name, way in ways.items():
        relative = (way(x).double() - exact).abs() / exact
        errors[name].append(max(relative.max().item(), 1e-9))

# %%
figure, axes = plt.subplots(figsize=(7, 3.4))
for (name, values), style in zip(errors.items(), ("--", ":", "-"), strict=True):
    axes.loglog(means, values, style, linewidth=2, label=name)
axes.axhline(1, color="#bbbbbb", linewidth=0.8)
axes.set(xlabel="mean of the row", ylabel="relative error", title="variance in float32")
axes.legend()
plt.show()

# %% [markdown]
"""
## Softmax, too

Maximum and sum of exponentials are one pair: where a larger maximum turns up, the sum is rescaled.
Rows that hold nothing but −inf, and single survivors, come out as PyTorch has them.
"""

# %%
softmax = turbotx.optimize(lambda x: torch.softmax(x, -1))
x = torch.randn(5, 33)
x[1] = -torch.inf
x[2, 1:] = -torch.inf
x[3] *= 1e4
assert torch.allclose(softmax(x), torch.softmax(x, -1), atol=1e-6, equal_nan=True)

# %% [markdown]
"""
## Passes over memory

A pass reads or writes every element once. Written as formulas, these three are six or more launches
for PyTorch, each with passes of its own. One kernel reads once and writes once.
"""


# %%
def layer_norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)


def rms_norm(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def masked_softmax(x):
    return torch.softmax(x * 0.125 + x.lt(-4) * -1e9, -1)


x = torch.randn(8, 64, 768)
passes = {}
for function in (layer_norm, rms_norm, masked_softmax):
    report = turbotx.explain(function, x)
    ours = sum(k.traffic.compulsory_nbytes for k in report.launches)
    found = (report.eager.moved_nbytes / x.nbytes, ours / x.nbytes, len(report.launches))
    passes[function.__name__] = found
    print(f"{function.__name__}: {found[0]:.1f} passes op by op, {found[1]:.1f} fused")

# %%
figure, axes = plt.subplots(figsize=(7, 2.4))
for shift, which, color, name in ((0.2, 0, "#c4c8ce", "op by op"), (-0.2, 1, "#4f8fd9", "fused")):
    places, values = [k + shift for k in range(3)], [p[which] for p in passes.values()]
    axes.barh(places, values, 0.38, color=color, label=name)
axes.set_yticks(range(3), passes)
axes.set(xlabel="passes over the tensor")
axes.legend()
plt.show()

# %%
assert max(errors["turbotx, one pass"]) < 1e-1 < 1 < max(errors["E[x²] − E[x]²"])
pairs = zip(errors["turbotx, one pass"], errors["two passes"], strict=True)
assert all(ours <= 2 * two + 1e-6 for ours, two in pairs)
assert all(round(ours) == 2 and launches == 1 for _, ours, launches in passes.values())
