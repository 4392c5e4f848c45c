"""Prometheus metrics of generation; tokens a second are the rate of a counter.

In: counts and durations as they happen. Out: the text that ``/metrics`` serves::

    metrics.first_token.observe(0.12); metrics.render()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from turbotx.serving.metrics import SECONDS, Figures

SHORT_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)


class GenerationMetrics:
    """One registry per server."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("turbotx_requests", "HTTP requests", ["path"], registry=registry)
        self.failed = Counter("turbotx_failed", "HTTP requests refused", ["err"], registry=registry)
        self.prompt_tokens = Counter(
            "turbotx_prompt_tokens", "tokens of prompts read, filling included", registry=registry
        )
        self.made_tokens = Counter("turbotx_generated_tokens", "tokens made", registry=registry)
        self.cancelled = Counter(
            "turbotx_cancelled", "requests whose client left", registry=registry
        )
        self.first_token = Histogram(
            "turbotx_first_token_seconds", "s from a request to its first token",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.token = Histogram(
            "turbotx_token_seconds", "s from one token of a text to the next",
            buckets=SHORT_SECONDS, registry=registry,
        )  # fmt: skip
        self.step = Histogram(
            "turbotx_step_seconds", "s of one step of decoding",
            buckets=SHORT_SECONDS, registry=registry,
        )  # fmt: skip
        self.read = Histogram(
            "turbotx_read_seconds", "s of reading one piece of prompts",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip

    def watch(self, figures: Callable[[], Mapping[str, float]]) -> None:
        """Collect gauges named ``turbotx_…`` from a function at every scrape."""
        self.registry.register(Figures(figures))

    def count_read(self, tokens: int, took_s: float) -> None:
        """Record one piece of prompts."""
        self.prompt_tokens.inc(tokens)
        self.read.observe(took_s)

    def count_step(self, sequences: int, took_s: float) -> None:
        """Record one step of so many sequences."""
        self.made_tokens.inc(sequences)
        self.step.observe(took_s)

    def render(self) -> bytes:
        """Return the text of a scrape."""
        text: bytes = generate_latest(self.registry)
        return text
