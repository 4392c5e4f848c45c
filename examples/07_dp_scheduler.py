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
# What dynamic programming does to a queue

Requests to a transformer differ in length, and a batch is padded to its longest member. Batching
many saves launches; batching unlike lengths wastes tokens. The scheduler decides who runs with
whom, and when. Everything here is simulated: it needs numpy and matplotlib, no model, no server.
"""

# %%
import matplotlib.pyplot as plt
import numpy as np

from turbotx.serving import POLICIES, Request, Scheduler
from turbotx.serving.plan import split
from turbotx.serving.simulation import offline_capacity_per_s, simulate, toy_table
from turbotx.serving.traces import make_trace, poisson_gaps, uniform_lengths

COLORS = plt.get_cmap("tab10").colors

# %% [markdown]
"""
## The cost table

Everything rests on one measured table: milliseconds for a batch of b requests padded to n tokens.
The toy below is a small GPU: 4 ms to launch, then 22 µs per padded token.
"""

# %%
costs = toy_table()
table = costs.dense()

figure, axes = plt.subplots(figsize=(6, 3))
for length in (10, 40, 100):
    batches = np.arange(1, 21)
    axes.plot(batches, table[length, 1:] / batches, label=f"{length} tokens")
axes.set(xlabel="batch size", ylabel="ms per request", title="What batching saves")
axes.legend()
plt.show()

# %% [markdown]
"""
## Splitting one queue

Forty waiting requests, as they came, cut into batches of at most twenty: the bars are requests, the
grey area is padding. First in arrival order, then as the dynamic program splits them.
"""

# %%
generator = np.random.default_rng(4)
lengths = generator.integers(2, 101, 40)


def draw(axes, lengths, pairs, title):
    total = 0.0
    for color, (start, end) in enumerate(pairs):
        members = lengths[start:end]
        total += table[members.max(), len(members)]
        padding = None if color else "padding"
        axes.bar(range(start, end), members.max(), width=1.0, color="#dddddd", label=padding)
        batch = f"batch of {len(members)}"
        axes.bar(range(start, end), members, width=0.8, color=COLORS[color % 10], label=batch)
    axes.legend(fontsize=7, loc="upper left", ncols=2)
    axes.set_title(f"{title}: {total:.0f} ms")
    axes.set_ylabel("tokens")


figure, (above, below) = plt.subplots(2, figsize=(9, 5), sharey=True)
draw(above, lengths, [(0, 20), (20, 40)], "first come, first served")
ordered = np.sort(lengths)
draw(below, ordered, split(ordered, table).pairs(), "dynamic program")
figure.tight_layout()
plt.show()

# %% [markdown]
r"""
The program is five lines of arithmetic. With the lengths in ascending order, `S[j]` is the least
time for the first `j` requests: some last group of `b` of them, on top of the best for the rest.

$$S_j = \min_{1 \le b \le B} S_{j-b} + \mathrm{cost}[\mathrm{length}_j][b]$$

Contiguous groups are enough: giving the shorter of two groups the shorter requests never costs
more, as long as the table never falls. The tests compare with every partition of small queues.
"""

# %% [markdown]
"""
## Least total time is not least waiting

That split is best for the *server*. For those who wait, a long request that joins a batch of
short ones delays them all. The default policy charges each group for everyone whom it delays: the
requests still waiting, and those who will come meanwhile. On a short queue it splits more finely.
"""

# %%
short_queue = np.array([10, 11, 95, 100])
n = len(short_queue)
for name, price in (
    ("least total time", None),
    ("least waiting", np.arange(n, 0, -1) + n * n / 10),
):
    groups = split(short_queue, table, price)
    batches = [short_queue[i:j].tolist() for i, j in groups.pairs()]
    ends = np.cumsum(groups.cost_ms)
    sizes = np.array([len(b) for b in batches])
    mean_ms = (ends * sizes).sum() / n
    print(f"{name:17} {batches}  total {ends[-1]:.1f} ms, mean latency {mean_ms:.1f} ms")

# %% [markdown]
"""
## Two thousand requests

Poisson arrivals at 0.8 of what the engine could do if it knew everything beforehand. First come,
first served drowns in padding. The paper's scheduler keeps up. The default replans before every
batch and weighs age, and so shortens both the mean and the tail.
"""

# %%
capacity = offline_capacity_per_s(uniform_lengths(2, 100)(generator, 2000).tolist(), costs)
trace = make_trace(
    poisson_gaps, uniform_lengths(2, 100), rate_per_s=0.8 * capacity, count=2000, seed=0
)
outcomes = {name: simulate(trace, Scheduler(costs, POLICIES[name]())) for name in POLICIES}

for name, outcome in outcomes.items():
    print(
        f"{name:7} {outcome.throughput_per_s:4.0f}/s   mean {outcome.latency_ms.mean():7.1f} ms   "
        f"p99 {outcome.percentile_ms(99):7.1f} ms   "
        f"padding {outcome.padded_tokens / outcome.tokens - 1:.0%}"
    )

# %%
figure, axes = plt.subplots(figsize=(7, 3.5))
for name in ("fifo", "sort", "dp", "aged"):
    latency = np.sort(outcomes[name].latency_ms)
    axes.plot(latency, np.linspace(0, 1, len(latency)), label=name)
axes.set(xscale="log", xlabel="latency, ms", ylabel="share of requests answered")
axes.legend()
plt.show()

# %% [markdown]
"""
## Nobody starves

Short-first scheduling alone would let long requests wait for ever. Here urgency grows with age, and
past a third of the age bound the oldest request decides, whatever its length. The latency of each
request over its length, for a bound of 400 ms at full load:
"""

# %%
busy = make_trace(poisson_gaps, uniform_lengths(2, 100), rate_per_s=capacity, count=2000, seed=1)
bounded = simulate(busy, Scheduler(costs, max_age_ms=400.0))
figure, axes = plt.subplots(figsize=(7, 3))
axes.scatter([r.length for r in busy], bounded.wait_ms, s=4, label="a request")
axes.axhline(400, color="#aa3333", label="the bound")
axes.legend()
axes.set(xlabel="tokens", ylabel="wait, ms", title=f"{bounded.refused} of {len(busy)} refused")
plt.show()
assert np.nanmax(bounded.wait_ms) <= 400

# %% [markdown]
"""
## Deadlines and priorities

A deadline nearer than the time to drain the queue counts as that much age, and each step of
priority multiplies the urgency.
"""

# %%
policy = POLICIES["aged"]()
waiting = [Request(i, length, 0.0) for i, length in enumerate((3, 4, 5, 90))]
hurried = [*waiting[:3], Request(3, 90, 0.0, deadline_ms=6.0)]
for name, queue in (("no deadline", waiting), ("due in 6 ms", hurried)):
    batches = policy.plan(queue, 0.0, table)
    print(name, [[r.length for r in batch.requests] for batch in batches])
assert [r.length for r in batches[0].requests] == [90]
