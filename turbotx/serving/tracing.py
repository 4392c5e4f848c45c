"""Optional OpenTelemetry spans, one per HTTP request.

In: the operator's ``otel=True`` and an installed opentelemetry-api. Out: spans through whatever
provider the process has set up, or nothing at all::

    with open_span(enabled, "/embed") as span: span.set_attribute("rows", 3)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from turbotx.errors import TurbotxError


class TracingError(TurbotxError, ImportError):
    """Tracing was asked for, and OpenTelemetry is not installed."""


class NoSpan:
    """Stands in for a span where tracing is off."""

    def set_attribute(self, key: str, value: object) -> None:
        """Do nothing: no span is recorded."""


def find_tracer(enabled: bool) -> Any | None:
    """Return the tracer of this package, or None. Raises TracingError when it is missing but
    wanted."""
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
    """Open a server span named after the route, child of the client's where its headers say so."""
    if tracer is None:
        yield NoSpan()
        return
    from opentelemetry.propagate import extract
    from opentelemetry.trace import SpanKind

    context = extract(dict(headers))
    with tracer.start_as_current_span(name, context=context, kind=SpanKind.SERVER) as span:
        yield span
