"""Variable-length requests, batched by dynamic programming, served over HTTP.

In: requests that know their length in tokens. Out: batches in the order in which to run them.
The scheduler computes with numpy alone; the HTTP server is the extra ``serve``::

    scheduler = Scheduler(CostTable.from_function(lambda length, batch: 4 + 0.022 * length * batch))
    scheduler.submit(Request("a", length=17, arrival_ms=0.0))
    scheduler.next(now_ms=0.0)        # Batch(requests=(Request(key='a', ...),), length=17, ...)
"""

from turbotx.serving.cost import CostTable
from turbotx.serving.policies import POLICIES, Aged, Fifo, PaperDP, Single, SortAndSlice
from turbotx.serving.request import Batch, Request
from turbotx.serving.scheduler import Hungry, Lazy, Overloaded, Scheduler

__all__ = [
    "POLICIES",
    "Aged",
    "Batch",
    "CostTable",
    "Fifo",
    "Hungry",
    "Lazy",
    "Overloaded",
    "PaperDP",
    "Request",
    "Scheduler",
    "Single",
    "SortAndSlice",
]
