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
# Variable lengths

A server never sees the same shape twice in a row. A compiler that specializes for shapes compiles
again and again; here a shape is only a set of numbers. We send the same stream of shapes through
PyTorch, `torch.compile` and turbotx, and count.
"""

# %%
import logging
import os
import tempfile
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import turbotx

logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
caches = tempfile.TemporaryDirectory()  # both begin with nothing built
os.environ["TURBOTX_CACHE_DIR"] = f"{caches.name}/turbotx"
os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{caches.name}/inductor"

# %% [markdown]
"""
## A block

The feed-forward half of a transformer layer, small enough to compile in seconds.
"""


# %%
class Block(nn.Module):
    def __init__(self, width=128):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x, mask):
        y = self.norm(x + self.down(F.gelu(self.up(x))))
        weight = torch.softmax(mask.log(), -1).unsqueeze(-1)
        return (y * weight).sum(1)


torch.manual_seed(0)
block = Block().eval()

# %% [markdown]
"""
## The stream

Forty requests of one to eight sentences and one to two hundred tokens, single ones among them.
"""

# %%
generator = np.random.default_rng(1)
pairs = zip(generator.integers(1, 9, 39), generator.integers(1, 201, 39), strict=True)
shapes = [(1, 1), *((int(b), int(n)) for b, n in pairs)]
stream = [(torch.randn(b, n, 128), torch.ones(b, n)) for b, n in shapes]


def send(modules):
    """Send the stream; the modules take turns at every request, and meet the same noise."""
    times = {name: [] for name in modules}
    with torch.no_grad():
        for x, mask in stream:
            for name, module in modules.items():
                begin = time.perf_counter()
                module(x, mask)
                times[name].append(1e3 * (time.perf_counter() - begin))
    return times


# %%
fast = turbotx.optimize(block)
compiled = torch.compile(block)
modules = {"PyTorch": block, "turbotx": fast, "torch.compile": compiled}
times = send(modules)
compilations = counters["stats"]["unique_graphs"]
print(f"torch.compile compiled {compilations} graphs, turbotx captured {fast.stats()['captures']}")

# %% [markdown]
"""
## Every call of the stream

The first call pays for compiling. turbotx pays once. The other pays whenever an assumption about
sizes breaks: the second shape, the first batch of one, the first length of one.
"""

# %%
figure, axes = plt.subplots(figsize=(8, 3.2))
for (name, values), style in zip(times.items(), ("-", "o-", "s-"), strict=True):
    axes.semilogy(values, style, markersize=3, linewidth=1, label=name)
axes.set(xlabel="call", ylabel="ms", title="forty shapes, one after the other")
axes.legend()
plt.show()
for name, values in times.items():
    print(f"{name:14} all {sum(values):7.0f} ms, first {values[0]:7.0f} ms")

# %% [markdown]
"""
## Every call, once all is compiled

The same stream again, five times; of each request the median. By now nobody compiles.
"""

# %%
rounds = [send(modules) for _ in range(5)]
settled = {name: np.median([r[name] for r in rounds], axis=0) for name in modules}
tokens = np.array([batch * length for batch, length in shapes])
order = np.argsort(tokens)
figure, axes = plt.subplots(figsize=(8, 3.2))
for (name, values), style in zip(settled.items(), ("-", "o-", "s-"), strict=True):
    axes.loglog(tokens[order], values[order], style, markersize=3, linewidth=1, label=name)
axes.set(xlabel="tokens of a request", ylabel="ms", title="medians of five, engines in turns")
axes.legend()
plt.show()
for name, values in settled.items():
    print(f"{name:14} median {np.median(values):.2f} ms, all {sum(values):6.1f} ms")

# %% [markdown]
"""
## What a new shape costs

Sizes and addresses are evaluated, which takes microseconds. Nothing is built, and the memory that
the largest shape mapped serves all the others.
"""

# %%
stats = fast.stats()
print({name: stats[name] for name in ("captures", "kernel_builds", "plans", "chunk_allocations")})
with torch.no_grad():
    worst = max((fast(x, m) - block(x, m)).abs().max().item() for x, m in stream)
print(f"largest difference from PyTorch over all shapes: {worst:.1e}")

# %%
assert stats["captures"] == 1
assert stats["plans"] == len(set(shapes))
assert compilations > 1
assert worst < 1e-4
