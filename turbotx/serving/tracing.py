"""Optional OpenTelemetry spans, one per HTTP request.

In: ``otel=True`` and an installed opentelemetry-api. Out: spans through the process's tracer
provider::

    with open_span(enabled, "/embed") as span: span.set_attribute("rows", 3)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from turbotx.errors import TurbotxError


class TracingError(TurbotxError, ImportError):
    """Tracing is enabled but OpenTelemetry is not installed."""


class NoSpan:
    """A span that records nothing, for disabled tracing."""

    def set_attribute(self, key: str, value: object) -> None:
        """Do nothing."""


def find_tracer(enabled: bool) -> Any | None:
    """Return the package's tracer, None if not enabled. Raises TracingError if OpenTelemetry is not
    installed."""
    if not enabled:
        return None
    try:
        from opentelemetry import trace
    except ImportError as error:
        raise TracingError(
            "otel=True needs opentelemetry: pip install opentelemetry-sdk"
        ) from error
    return trace.get_tracer("turbotx.serving")


@contextlib.contextmanager
def open_span(tracer: Any | None, name: str, headers: Mapping[str, str]) -> Iterator[Any]:
    """Context of a server span named after the route, a child of the span in the headers if any."""
    if tracer is None:
        yield NoSpan()
        return
    from opentelemetry.propagate import extract
    from opentelemetry.trace import SpanKind

    context = extract(dict(headers))
    with tracer.start_as_current_span(name, context=context, kind=SpanKind.SERVER) as span:
        yield span
