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
# Anatomy of a fused kernel

From four lines of PyTorch to the instructions of a GPU that this machine need not have: what is
captured, what is fused, what is printed, and what the GPU's assembler makes of it.
"""

# %%
from collections import Counter

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import turbotx
from turbotx.cli.targets import find_jobs
from turbotx.engine.optimize import engine_of
from turbotx.ir.printer import show_kernel
from turbotx.kernels.triton.compiler import build

# %% [markdown]
"""
## Four operations

Bias, residual and layer normalization: what stands after every matrix product of a transformer.
Run one by one, each of them reads and writes all of its tensors.
"""


# %%
@turbotx.optimize
def finish(product, bias, residual, weight):
    return F.layer_norm(product + bias + residual, (768,), weight)


tensors = (torch.randn(4, 128, 768), torch.randn(768), torch.randn(4, 128, 768), torch.randn(768))
report = turbotx.explain(finish, *tensors)

# %% [markdown]
"""
## The captured operations

A capture is a graph of ATen calls whose sizes are symbols: it holds for any batch and length.
"""

# %%
for node in report.origin.nodes:
    if node.kind == "call_function" and node.nbytes != 0:
        print(f"{node.op:12} result: {node.nbytes} bytes")

# %% [markdown]
"""
## One kernel

A kernel says what one element of its result is: loops over rows and columns, loads, arithmetic,
reductions, stores. `welford` takes mean and variance in one pass. Everything else, for every
target, is printed from these lines.
"""

# %%
(launch,) = report.compiled.assembly.launches
print(show_kernel(launch.kernel))

# %% [markdown]
"""
## Triton

One program takes a few rows; the row stays in registers between the reduction and the store.
"""

# %%
(kernel,) = report.kernels
print(kernel.sources["triton"])

# %% [markdown]
"""
## PTX, without a GPU

Triton is a cross compiler. The same source becomes machine code for three generations of NVIDIA's
GPUs and one of AMD's, and the compiled file tells what it uses: registers, spills, and how many
bits one load fetches.
"""

# %%
found = find_jobs(report, engine_of(finish), ["sm_80", "sm_90", "gfx942"])
built = build([x.job for x in found])
for b in built:
    print(f"{b.job.target:7} {b.resources}")

# %%
ptx = built[1].files["ptx"].read_text()
loads = [line.strip() for line in ptx.splitlines() if "ld.global" in line]
print(f"{len(loads)} loads from memory, for example\n{loads[0]}")

# %% [markdown]
"""
## What the instructions do

Most are arithmetic on registers. Few touch memory, and each moves 128 bits for every thread;
shuffles carry the reduction from thread to thread.
"""

# %%
GROUPS = {"ld": "load, store", "st": "load, store", "shfl": "shuffle", "bar": "barrier"}
GROUPS |= dict.fromkeys(("fma", "add", "mul", "sub", "div", "rsqrt"), "arithmetic")
words = [line.split() for line in ptx.splitlines() if line.startswith("\t") and line.endswith(";")]
names = [w[1] if w[0].startswith("@") else w[0] for w in words]
names = [n.split(".")[0] for n in names if not n.startswith(".")]
counts = Counter(GROUPS.get(n, "other") for n in names)

figure, axes = plt.subplots(figsize=(7, 2.6))
axes.barh(*zip(*counts.most_common()[::-1], strict=True), color="#4f8fd9")
axes.set(xlabel="instructions", title=f"{kernel.name} for sm_90")
plt.show()

# %% [markdown]
"""
The kernel moves what it must: each input read once, the result written once. Op by op it would be
more than twice as much.
"""

# %%
alone = report.eager.moved_nbytes
print(f"moved by the kernel {kernel.compulsory_nbytes:,} bytes, op by op {alone:,}")

product, bias, residual, weight = tensors
expected = F.layer_norm(product + bias + residual, (768,), weight)
assert torch.allclose(finish(*tensors), expected, atol=1e-5)
assert all(b.resources.spills == 0 for b in built)
assert all(b.resources.load_bits == 128 for b in built)
assert alone > 2 * kernel.compulsory_nbytes
