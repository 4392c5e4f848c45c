"""Why a request was not answered: one class per reason, with its HTTP status.

In: a message for the client. Out: an exception that the routes turn into a response body in the
shape of the API that was called::

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
    """The body parses, or nearly does, but does not say what was asked for."""

    status, kind = 422, "validation"


class TooLarge(Refusal):
    """Body, batch or sequence over its limit."""

    status, kind = 413, "too_large"


class Missing(Refusal):
    """There is nothing of that name."""

    status, kind = 404, "not_found"


class Unsupported(Refusal):
    """The body's encoding is not one that is read here."""

    status, kind = 415, "validation"


class Unauthorized(Refusal):
    """No API key, or a wrong one."""

    status, kind = 401, "unauthorized"


class Busy(Refusal):
    """The queue is full; ``retry_after_s`` says when it may not be."""

    status, kind = 429, "overloaded"


class BackendFailed(Refusal):
    """The model raised an error for this input."""

    status, kind = 424, "backend"


class NotReady(Refusal):
    """Starting, or shutting down."""

    status, kind = 503, "unavailable"


class Late(Refusal):
    """Its deadline passed before its turn came: it was not computed."""

    status, kind = 504, "timeout"


class TimedOut(Refusal):
    """Accepted, but not answered within the time-out."""

    status, kind = 503, "timeout"
