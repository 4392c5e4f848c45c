"""Prometheus metrics of generation; tokens per second are the rate of a counter.

In: counts and durations. Out: the text of ``/metrics``::

    metrics.first_token.observe(0.12); metrics.render()
"""

from __future__ import annotations

from turbotx.serving.metrics import SECONDS, MetricsRegistry

SHORT_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)


class GenerationMetrics(MetricsRegistry):
    """Metrics of the generation server."""

    def __init__(self) -> None:
        super().__init__()
        counter, histogram = self.counter, self.histogram
        self.requests = counter("turbotx_requests", "HTTP requests", "path")
        self.failed = counter("turbotx_failed", "HTTP requests refused", "err")
        self.prompt_tokens = counter(
            "turbotx_prompt_tokens", "tokens of prompts read, filling included"
        )
        self.prefix_hits = counter(
            "turbotx_prefix_hit_tokens", "tokens of prompts whose keys and values were known"
        )
        self.made_tokens = counter("turbotx_generated_tokens", "tokens made")
        self.cancelled = counter("turbotx_cancelled", "requests whose client left")
        self.first_token = histogram(
            "turbotx_first_token_seconds", "s from a request to its first token", SECONDS
        )
        self.token = histogram(
            "turbotx_token_seconds", "s from one token of a text to the next", SHORT_SECONDS
        )
        self.step = histogram("turbotx_step_seconds", "s of one step of decoding", SHORT_SECONDS)
        self.read = histogram("turbotx_read_seconds", "s of reading one piece of prompts", SECONDS)

    def count_read(self, tokens: int, took_s: float) -> None:
        """Record the prefill of a piece of prompts."""
        self.prompt_tokens.inc(tokens)
        self.read.observe(took_s)

    def count_step(self, sequences: int, took_s: float) -> None:
        """Record one decoding step; sequences: the batch size."""
        self.made_tokens.inc(sequences)
        self.step.observe(took_s)
