"""Refusals: exceptions for requests that are not answered, one class per HTTP status and reason.

In: a message for the client. Out: an exception that the routes convert to an error response in the
called API's format::

    raise TooLarge("the text has 812 tokens, the model takes 512: shorten it or set truncate")
"""

from __future__ import annotations

from turbotx.errors import TurbotxError


class Refusal(TurbotxError):
    """Base: ``status`` is the HTTP status, ``kind`` the machine-readable reason."""

    status = 500
    kind = "backend"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class BadInput(Refusal):
    """The body or a header is invalid."""

    status, kind = 422, "validation"


class TooLarge(Refusal):
    """The body, batch or sequence exceeds a limit."""

    status, kind = 413, "too_large"


class Missing(Refusal):
    """No model or path of that name."""

    status, kind = 404, "not_found"


class Unsupported(Refusal):
    """The body's Content-Encoding is not supported."""

    status, kind = 415, "validation"


class Unauthorized(Refusal):
    """No API key, or a wrong one."""

    status, kind = 401, "unauthorized"


class Busy(Refusal):
    """The queue is full; ``retry_after_s``: when to retry."""

    status, kind = 429, "overloaded"


class BackendFailed(Refusal):
    """The model raised an error for this input."""

    status, kind = 424, "backend"


class NotReady(Refusal):
    """The server is starting or shutting down."""

    status, kind = 503, "unavailable"


class Late(Refusal):
    """The request's deadline passed while it waited; it was not computed."""

    status, kind = 504, "timeout"


class TimedOut(Refusal):
    """Accepted, but not answered within the server's time-out."""

    status, kind = 503, "timeout"
