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
# A decode step

A decoder makes one token at a time, and keeps the keys and values of all tokens before it. This
notebook looks at what one such step is made of, where its cache lies, and what becomes of the cache
while beams fork.
"""

# %%
import matplotlib.pyplot as plt
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

import turbotx

# %%
torch.manual_seed(0)
torch.set_grad_enabled(False)
config = GPT2Config(vocab_size=500, n_embd=128, n_layer=4, n_head=4, n_positions=256)
model = GPT2LMHeadModel(config).eval()
model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
fast = turbotx.optimize(model)
prompt = torch.randint(1, 500, (1, 24))
tokens = fast.generate(prompt, max_new_tokens=40, do_sample=False)
assert torch.equal(tokens, model.generate(prompt, max_new_tokens=40, do_sample=False))
print({name: fast.stats()[name] for name in ("captures", "eager_calls", "cache_peak_nbytes")})

# %% [markdown]
"""
The loop is that of transformers. All 40 forwards, the prompt's too, were served by one capture: its
number of new tokens and the length of its cache are both free.

## What a step is made of

`explain` takes a call with a cache as it takes any other. It looks at a copy: the cache stays as it
was.
"""

# %%
cache = DynamicCache(config=config)
model(prompt, past_key_values=cache, use_cache=True)
step = {"input_ids": prompt[:, -1:], "past_key_values": cache, "use_cache": True}
report = turbotx.explain(fast, **step)
for launch in report.launches[:9]:
    print(f"{launch.name:40} {launch.traffic.compulsory_nbytes:9,} bytes")
print(f"... {len(report.launches)} launches for 4 layers; {report.cache}")

# %% [markdown]
"""
Seven launches a layer compute, and two copy the new key and value behind those that the cache
holds. Nothing else moves the cache: attention reads it where it lies. The weights are most of what
a step reads, until the past is long:
"""

# %%
weights = sum(p.nbytes for p in model.parameters()) - model.transformer.wpe.weight.nbytes
lengths = list(range(8, 257, 8))
read = [report.at(length=n, capacity=256).cache.filled_nbytes for n in lengths]
figure, axes = plt.subplots(figsize=(8, 3))
axes.stackplot(lengths, [[weights / 2**20] * len(lengths), [n / 2**20 for n in read]],
               labels=["weights", "keys and values"], colors=["#9ab", "#c52"])  # fmt: skip
axes.set(xlabel="tokens so far", ylabel="MiB that a step reads", xlim=(8, 256))
axes.legend(loc="upper left")
plt.show()

# %% [markdown]
"""
## Where the cache lies

All layers lie in one tensor with room for more positions than are filled. When it is full it grows
to twice its size, and its rows move once. A cache that is concatenated anew moves all of them at
every step.
"""

# %%
cache, filled, held, moved, concatenated = DynamicCache(config=config), [], [], [0], [0]
for k in range(200):
    fast(prompt[:, :1], past_key_values=cache, use_cache=True)
    memory = cache.layers[0].memory
    filled.append((k + 1) * memory.position_nbytes)
    grown = bool(held) and memory.nbytes > held[-1]
    moved.append(moved[-1] + grown * k * memory.position_nbytes)
    concatenated.append(concatenated[-1] + k * memory.position_nbytes)
    held.append(memory.nbytes)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.plot([n / 2**20 for n in held], label="held", color="#9ab")
left.plot([n / 2**20 for n in filled], label="filled", color="#c52")
left.set(xlabel="tokens", ylabel="MiB", title="the cache")
right.plot([n / 2**20 for n in concatenated], label="concatenated anew", color="#9ab")
right.plot([n / 2**20 for n in moved], label="grown in place", color="#c52")
right.set(xlabel="tokens", title="moved so far, MiB")
for axes in (left, right):
    axes.legend()
plt.show()
assert held[-1] >= filled[-1] and moved[-1] * 20 < concatenated[-1]

# %% [markdown]
"""
## While beams fork

Beam search keeps the best few texts so far. Most steps, a text or two is given up, and the place of
its cache is taken by a copy of another one's, which goes on in two ways. Those two are alike up to
where they fork, and soon all beams are alike but for their latest tokens: the cache knows how many
of the first positions any two rows share, and copies only the rest.
"""


# %%
class Watched(DynamicCache):
    """Notes which beams go on at each step."""

    def reorder_cache(self, beam_idx):
        forks.append(beam_idx.tolist())
        super().reorder_cache(beam_idx)


forks, beams, start = [], 4, prompt.shape[1]
way = {"num_beams": beams, "max_new_tokens": 24, "do_sample": False}
watched = model.generate(prompt, past_key_values=Watched(config=config), **way)
assert torch.equal(fast.generate(prompt, **way), watched)

made, alike = [[] for _ in range(beams)], [[start] * beams for _ in range(beams)]
pictures, whole, copied = [], 0, 0
for k, chosen in enumerate(forks):
    for row in range(beams):
        made[row] = [*made[row], row]  # who has written each position, for the picture
    length = start + k
    came = [(row, source) for row, source in enumerate(chosen) if row != source]
    first = min((alike[row][source] for row, source in came), default=length)
    whole, copied = whole + beams * length, copied + len(came) * max(0, length - first)
    made = [made[source] for source in chosen]
    alike = [[length if a == b else alike[a][b] for b in chosen] for a in chosen]
    pictures.append((list(made), first - start, [row for row, _ in came]))

# %% [markdown]
"""
A column is a position behind the prompt, a row is a beam's cache; a colour says which row wrote the
position first. The outline is what is copied at that step.
"""

# %%
figure, rows = plt.subplots(4, 1, figsize=(8, 5), sharex=True)
for axes, k in zip(rows, (2, 8, 14, len(pictures) - 1), strict=True):
    grid, first, came = pictures[k]
    for row, writers in enumerate(grid):
        for position, writer in enumerate(writers):
            axes.add_patch(plt.Rectangle((position, row), 1, 0.9, color=f"C{writer}"))
        if row in came:
            width = len(writers) - first
            axes.add_patch(plt.Rectangle((first, row), width, 0.9, fill=False, linewidth=2))
    axes.set(xlim=(0, 24), ylim=(beams, 0), yticks=[], ylabel=f"step {k + 1}")
rows[-1].set_xlabel("positions behind the prompt")
plt.show()
print(f"positions copied: {copied}; were every row moved at every step: {whole}")
assert copied * 4 < whole

# %% [markdown]
"""
`docs/decoding.md` says what else a cache does, and what is refused by name.
"""
