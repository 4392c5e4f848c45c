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
# A first fused graph

turbotx takes a PyTorch model and returns one that is called in the same way. Between the two stands
a graph: every run of small operations between two matrix products has become one generated kernel.
This notebook makes such a graph, looks at it, and checks that it computes what the model does.
"""

# %%
import matplotlib.pyplot as plt
import torch
from transformers import BertConfig, BertModel

import turbotx

# %% [markdown]
"""
## A model

BERT with two layers and random weights: nothing is downloaded. Any module that PyTorch can export
would do.
"""

# %%
torch.manual_seed(0)
config = BertConfig(
    vocab_size=1000,
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=1024,
)
model = BertModel(config).eval()
ids = torch.randint(5, 1000, (4, 64))
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

# %% [markdown]
"""
## Two lines

The first call captures the model, fuses it and builds the kernels. Later calls of any batch size
and length run the same program.
"""

# %%
fast = turbotx.optimize(model)
hidden = fast(**batch).last_hidden_state

with torch.no_grad():
    expected = model(**batch).last_hidden_state
error = (hidden - expected).abs().max().item()
print(f"largest difference from PyTorch: {error:.1e}")

# %% [markdown]
"""
## What it became

`explain` tells what every stage made of the model. In a notebook it shows this; in a terminal,
`print(report)` shows tables; `report.to_html()` is a page with the whole graph to walk through.
"""

# %%
report = turbotx.explain(fast, **batch)
report

# %% [markdown]
"""
## The same as a picture

Each bar is one launch, in the order they run. PyTorch launches every operation by itself; turbotx
launches matrix products, attention, and one kernel for whatever stands between them.
"""

# %%
COLORS = {"gemm": "#e8a33d", "attention": "#5fae57", "kernel": "#4f8fd9", "aten": "#d4574f"}
kinds = {launch.name: launch.kind for launch in report.launches}
went = [report.where(n.name).launches for n in report.origin.nodes if n.makes_memory]
before = [COLORS[kinds[names[0]]] if names else "#c4c8ce" for names in went]
after = [COLORS[launch.kind] for launch in report.launches]

figure, axes = plt.subplots(figsize=(9, 1.6))
for height, row in ((1, before), (0, after)):
    axes.bar(range(len(row)), 0.8, 0.85, bottom=height, color=row, align="edge")
axes.set_yticks([1.4, 0.4], [f"PyTorch: {len(before)}", f"turbotx: {len(after)}"])
axes.set_xticks([])
axes.spines[:].set_visible(False)
keys = {"kernel": "kernel", "gemm": "matrix product", "attention": "attention"}
for kind, words in keys.items():
    axes.bar(0, 0, color=COLORS[kind], label=words)
axes.bar(0, 0, color="#c4c8ce", label="not needed at all")
axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
plt.show()

# %% [markdown]
"""
## It is still a graph

`fast.graph` is an ordinary `torch.fx.GraphModule`. It prints, draws and runs. Each region is a
submodule that holds the operations it replaced, and `report.where` says what became of any
operation of the model, with the line of source that it came from.
"""

# %%
regions = [node.target for node in fast.graph.graph.nodes if node.op == "call_module"]
print("\n".join(regions))
print(fast.graph.get_submodule("fused_add_gelu_0").code.strip())

# %%
place = report.where("gelu")
print(place.status, "in", place.launches[0], "from", place.source.rpartition("/")[2])

# %% [markdown]
"""
The graph gives the model's own results, and one capture served everything.
"""

# %%
with torch.no_grad():
    through_graph = fast.graph(*batch.values())[0]

fast(input_ids=ids[:1, :7], attention_mask=torch.ones(1, 7, dtype=torch.long))
assert error < 1e-4
assert torch.allclose(through_graph, expected, atol=1e-5)
assert len(after) < len(before)
assert fast.stats()["captures"] == 1
