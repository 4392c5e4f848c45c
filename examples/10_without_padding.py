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
# Without padding

A batch of texts of 5 to 500 tokens is computed as if each had 500. Here the same model runs it over
its tokens alone, and we look at where the time of both went. The program over tokens is derived
from the model's graph; [packed.md](../docs/packed.md) says how.
"""

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn
from transformers import BertConfig, BertModel

import turbotx

# %% [markdown]
"""
## A model and a batch

Two layers of MiniLM's size, random weights, and the mean of the tokens that the mask shows.
"""


# %%
class Embedder(nn.Module):
    def __init__(self):
        super().__init__()
        config = BertConfig(
            vocab_size=1000, hidden_size=384, intermediate_size=1536, num_hidden_layers=2
        )
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids, attention_mask):
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return (hidden * attention_mask[:, :, None]).sum(1) / attention_mask.sum(1, keepdim=True)


torch.manual_seed(0)
model = Embedder().eval()
lengths = [5 + 45 * k for k in range(12)]
mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
ids = torch.randint(5, 1000, mask.shape) * mask
tokens, padded_tokens = sum(lengths), mask.numel()
print(f"{len(lengths)} texts of {min(lengths)} to {max(lengths)} tokens")
print(f"{tokens} tokens, {padded_tokens} with padding: {padded_tokens / tokens:.2f} times as many")

# %% [markdown]
"""
## Twice the same

`padding="packed"` takes the ordinary padded call, and `packed` the tokens with no mask at all.
"""

# %%
padded = turbotx.optimize(model)
packed = turbotx.optimize(model, padding="packed")
call = {"input_ids": ids, "attention_mask": mask}
with torch.no_grad():
    expected = padded(**call)
    difference = (packed(**call) - expected).abs().max()
    flat = packed.packed(input_ids=ids[mask.bool()], lengths=lengths)
print(f"the largest difference of {tuple(expected.shape)} numbers: {difference:.1e}")

# %% [markdown]
"""
## Where the time goes

Every launch timed, the fastest of three medians, taken in turns. GEMMs and elementwise kernels cost
the tokens that there are; attention costs their squares, text by text, so that padding costs it
most. Choosing the rows of the padded call, and putting results back, is not in the bars; a flat
call does without.
"""

# %%
reports = {
    name: turbotx.explain(fast, **call) for name, fast in (("padded", padded), ("packed", packed))
}
kinds = {"gemm": "GEMMs", "attention": "attention", "kernel": "the rest"}
spent = {name: {} for name in reports}
for _ in range(3):
    for name, report in reports.items():
        found = dict.fromkeys(kinds.values(), 0.0)
        for kind, (us, _) in report.profile(**call, runs=5).by(lambda x: x.kind).items():
            found[kinds.get(kind, "the rest")] += us / 1e3
        if not spent[name] or sum(found.values()) < sum(spent[name].values()):
            spent[name] = found
figure, axes = plt.subplots(figsize=(7.5, 2.2))
left = dict.fromkeys(spent, 0.0)
for kind in spent["padded"]:
    axes.barh(list(spent), [x[kind] for x in spent.values()], left=list(left.values()), label=kind)
    left = {name: left[name] + spent[name][kind] for name in spent}
axes.set(xlabel="ms", title=f"one batch of {len(lengths)} texts")
axes.invert_yaxis()
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
figure.tight_layout()
plt.show()
for name, found in spent.items():
    shown = ", ".join(f"{kind} {ms:.1f} ms" for kind, ms in found.items())
    print(f"{name}: {shown}; {1e3 * sum(found.values()) / tokens:.0f} µs a token of text")

# %% [markdown]
"""
## A file, and a server

The packed program is saved like any other, and `turbotx serve` runs its batches this way wherever
it can: `--padding auto`. What a batch takes is then known from its tokens, so texts of any lengths
may share one, and a batch ends where more tokens make none of them cheaper. The rates below are
about those of six such layers on two cores.
"""

# %%
from turbotx.serving import Request, Scheduler
from turbotx.serving.token_costs import TokenCosts

costs = TokenCosts.from_rates(
    launch_ms=0.5, token_ms=0.1, square_ms=5e-5, max_length=500, max_tokens=16_384
)
scheduler = Scheduler(costs)
for key, length in enumerate(lengths):
    scheduler.submit(Request(key, length, arrival_ms=0.0))
print("a batch ends at", costs.prices().knee, "tokens")
while (batch := scheduler.next(now_ms=0.0)) is not None:
    print(f"{batch.lengths}: {batch.tokens} tokens, {batch.cost_ms:.1f} ms")

# %%
assert padded_tokens > 1.9 * tokens
assert difference < 1e-5 and torch.allclose(flat, expected, atol=1e-5)
assert packed.stats()["captures"] == 1
assert reports["packed"].memory.arena_nbytes < reports["padded"].memory.arena_nbytes
