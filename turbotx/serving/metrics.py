"""Prometheus metrics, with text-embeddings-inference's names where it has the same metric.

In: counts and durations. Out: the text of ``/metrics``::

    metrics.requests.labels("/embed").inc()
    metrics.render()      # b'# HELP te_request_count ...'
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from turbotx.serving.request import Batch

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = tuple(2**k for k in range(3, 18))
MILLISECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
RATIOS = (1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 2, 3, 5, 10)


class MetricsRegistry:
    """One registry per server, so that two servers in a process do not mix."""

    requests: Any  # counter by path
    failed: Any  # counter by kind of refusal

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def counter(self, name: str, text: str, *labels: str) -> Any:
        """Return a new counter."""
        return Counter(name, text, labels, registry=self.registry)

    def histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Any:
        """Return a new histogram over these upper bounds."""
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def watch(self, figures: Callable[[], Mapping[str, float]]) -> None:
        """Export the function's values as gauges ``turbotx_…`` at every scrape."""
        self.registry.register(Figures(figures))

    def render(self) -> bytes:
        """Return the text of a scrape."""
        text: bytes = generate_latest(self.registry)
        return text


class Metrics(MetricsRegistry):
    """Metrics of the embedding and classification server."""

    def __init__(self) -> None:
        super().__init__()
        counter, histogram = self.counter, self.histogram
        self.requests = counter("te_request_count", "HTTP requests", "method")
        self.succeeded = counter("te_request_success", "HTTP requests answered", "method")
        self.failed = counter("te_request_failure", "HTTP requests refused", "err")
        self.duration = histogram("te_request_duration", "s per HTTP request", SECONDS)
        self.tokenizing = histogram(
            "te_request_tokenization_duration", "s to tokenise a request", SECONDS
        )
        self.queueing = histogram("te_request_queue_duration", "s a row waited", SECONDS)
        self.inference = histogram("te_request_inference_duration", "s its batch ran", SECONDS)
        self.queue_size = Gauge("te_queue_size", "rows waiting", registry=self.registry)
        self.batch_size = histogram("te_batch_next_size", "rows per batch", COUNTS)
        self.batch_tokens = histogram("te_batch_next_tokens", "padded tokens per batch", TOKENS)
        self.padding = histogram("turbotx_padding_ratio", "padded over real tokens", RATIOS)
        self.efficiency = histogram("turbotx_cost_ratio", "measured over predicted cost", RATIOS)
        self.plan_ms = histogram("turbotx_plan_ms", "ms to choose a batch", MILLISECONDS)
        self.tokens = counter("turbotx_tokens", "real tokens computed")
        self.padded_tokens = counter("turbotx_padded_tokens", "tokens computed, padding included")
        self.cache_hits = counter("turbotx_cache_hits", "rows answered from the cache")
        self.cache_misses = counter("turbotx_cache_misses", "rows the cache did not have")
        self.coalesced = counter("turbotx_coalesced", "rows that joined an equal one in flight")
        self.dropped = counter("turbotx_dropped", "rows taken off the queue: their client left")

    def count_batch(self, batch: Batch, took_ms: float) -> None:
        """Record a batch's size, padding and ratio of measured to estimated time."""
        self.batch_size.observe(len(batch.requests))
        self.batch_tokens.observe(batch.padded_tokens)
        self.padding.observe(batch.padded_tokens / batch.tokens)
        self.efficiency.observe(took_ms / batch.cost_ms)
        self.tokens.inc(batch.tokens)
        self.padded_tokens.inc(batch.padded_tokens)

    def count_row(self, queued_ms: float, computed_ms: float) -> None:
        """Record a row's queue time and its batch's duration, in ms."""
        self.queueing.observe(queued_ms / 1e3)
        self.inference.observe(computed_ms / 1e3)

    def render(self) -> bytes:
        """Return the text of a scrape, with counters named as in text-embeddings-inference.

        prometheus_client appends _total to counters and adds a _created series; both are removed.
        """
        text = re.sub(rb"(?m)^.*\bte_\w+_created\b.*\n", b"", super().render())
        return re.sub(rb"\b(te_request_(?:count|success|failure))_total\b", rb"\1", text)


class Figures:
    """Collector of gauges ``turbotx_…`` from a function, for prometheus_client."""

    def __init__(self, figures: Callable[[], Mapping[str, float]]) -> None:
        self._figures = figures

    def collect(self) -> Any:
        """Yield a gauge per value of the function."""
        for name, value in self._figures().items():
            yield GaugeMetricFamily(f"turbotx_{name}", name.replace("_", " "), value=value)
