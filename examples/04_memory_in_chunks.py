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
# Memory in chunks

Between its inputs and its outputs a model makes dozens of tensors, most of them alive for a few
launches only. Two that are never alive together can lie in the same bytes. This notebook shows
where turbotx puts them, for every length at once, and how near that comes to the least possible.
"""

# %%
import tempfile

import matplotlib.pyplot as plt
import torch
from IPython.display import Image
from matplotlib.animation import FuncAnimation, PillowWriter
from transformers import BertConfig, BertModel

import turbotx

# %%
torch.manual_seed(0)
config = BertConfig(vocab_size=500, hidden_size=256, num_hidden_layers=3, num_attention_heads=4)
model = BertModel(config).eval()
ids = torch.randint(5, 500, (4, 128))
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
report = turbotx.explain(turbotx.optimize(model, backend="aten"), **batch)
memory = report.memory
print(f"{len(memory.buffers)} buffers in {memory.peak_nbytes / 2**20:.2f} MiB")

# %% [markdown]
"""
## Address over time

A box is a buffer: as wide as it is alive, as high as it is large. The black line is the bytes alive
in each launch. No plan can be lower than its highest point, the dashed line.
"""


# %%
def draw(axes, memory, top_nbytes):
    axes.clear()
    last = max(b.lifetime[1] for b in memory.buffers)
    live = [0.0] * last
    for k, b in enumerate(memory.buffers):
        begin, end = b.lifetime
        color = plt.get_cmap("tab20")(k % 20)
        high, low = b.nbytes / 2**20, b.offset / 2**20
        axes.bar(begin, high, end - begin, low, align="edge", color=color, edgecolor="white")
        live[begin:end] = [n + high for n in live[begin:end]]
    axes.step(range(last), live, "k", where="post", linewidth=1, label="bytes alive")
    bound = memory.lower_bound_nbytes / 2**20
    axes.axhline(bound, color="#c22", linestyle="--", label="lower bound")
    axes.legend(loc="upper right", fontsize=8)
    axes.set(xlim=(0, last), ylim=(0, top_nbytes / 2**20), xlabel="launch", ylabel="MiB")


figure, axes = plt.subplots(figsize=(8, 3.6))
draw(axes, memory, memory.peak_nbytes * 1.08)
axes.set_title("batch 4, length 128")
plt.show()

# %% [markdown]
"""
## Every length at once

The plan is no list of addresses but an order: which buffer lies on which. An address is the highest
top among those below, a maximum of a few sums of sizes. So a new length needs no new plan, only new
numbers, and what did not overlap at one length does not overlap at any.
"""

# %%
lengths = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512]
plans = {n: report.at(seq=n).memory for n in lengths}

figure, axes = plt.subplots(figsize=(6, 3.2), dpi=70)


def frame(n):
    draw(axes, plans[n], plans[256].peak_nbytes * 1.08)
    axes.set_title(f"batch 4, length {n}: {plans[n].peak_nbytes / 2**20:.2f} MiB")
    figure.tight_layout()


animation = FuncAnimation(figure, frame, frames=[n for n in lengths if n <= 256][2::2])
with tempfile.TemporaryDirectory() as folder:
    animation.save(f"{folder}/lengths.gif", PillowWriter(fps=3))
    picture = Image(f"{folder}/lengths.gif", embed=True)
plt.close(figure)
picture

# %% [markdown]
"""
## Against the lower bound, and against others

The default planner lies on the bound. The chunks of TurboTransformers (2 MiB and more each) and
PyTorch, whose results live until their last reader, need more.
"""

# %%
chunked = turbotx.explain(turbotx.optimize(model, backend="aten", planner="chunked"), **batch)
chunks = [sum(nbytes for _, nbytes in chunked.at(seq=n).memory.chunks) for n in lengths]
figure, axes = plt.subplots(figsize=(7, 3.2))
for label, values, style in (
    ("PyTorch, alive at once", [plans[n].pytorch.peak_nbytes for n in lengths], ":"),
    ("TurboTransformers' chunks", chunks, "-."),
    ("turbotx", [plans[n].peak_nbytes for n in lengths], "-"),
    ("lower bound", [plans[n].lower_bound_nbytes for n in lengths], "--"),
):
    axes.plot(lengths, [v / 2**20 for v in values], style, label=label)
axes.set(xlabel="length", ylabel="MiB")
axes.legend()
plt.show()

# %% [markdown]
"""
## Chunks

The arena grows and shrinks by chunks of 2 MiB, the size of a huge page, while addresses in it stay
as they are. A stream of calls maps memory for its largest shape, once.
"""

# %%
fast = turbotx.optimize(model)
held = []
for n in (16, 64, 32, 512, 8, 256):
    fast(input_ids=ids[:, :1].expand(4, n), attention_mask=torch.ones(4, n, dtype=torch.long))
    held.append((n, fast.stats()["mapped_nbytes"] / 2**20))
print(", ".join(f"length {n}: {mib:.0f} MiB mapped" for n, mib in held))

# %%
assert all(p.peak_nbytes <= 1.01 * p.lower_bound_nbytes for p in plans.values())
assert all(p.peak_nbytes < p.pytorch.peak_nbytes for p in plans.values())
assert held[-1][1] <= max(mib for _, mib in held)
