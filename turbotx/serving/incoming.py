"""Incoming: reads key, id and scope of a request before its handler.

In: Starlette's request and the settings. Out: checked values, or a refusal::

    scope = read_scope(request, now_ms)     # Scope(deadline_ms=inf, priority=1)
"""

from __future__ import annotations

import hmac
import math
import uuid

from starlette.requests import Request

from turbotx.serving.refusals import BadInput, Unauthorized
from turbotx.serving.service import Scope
from turbotx.serving.settings import Settings

PRIORITIES = {"low": -1, "normal": 0, "high": 1}
ID_LENGTH = 128


def check_key(settings: Settings, request: Request) -> None:
    """Raise Unauthorized unless ``Authorization`` or ``X-API-Key`` has one of the API keys."""
    keys = settings.api_keys
    if not keys:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = request.headers.get("x-api-key", "")
    sent = given.encode("latin-1")  # the header's original bytes
    fits = [hmac.compare_digest(sent, key.encode()) for key in keys]  # no early exit: constant time
    if not any(fits):
        raise Unauthorized("give the API key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")


def read_id(request: Request) -> str:
    """Return the client's ``X-Request-Id`` if it is short and printable, else a new id."""
    given = request.headers.get("x-request-id", "")
    fits = 0 < len(given) <= ID_LENGTH and given.isascii() and given.isprintable()
    return given if fits else uuid.uuid4().hex


def read_scope(request: Request, now_ms: float) -> Scope:
    """Return priority and deadline of a request.

    ``X-Priority``: low, normal or high; ``X-Deadline-Ms``: ms from now, zero or more. Raises
    BadInput for other values."""
    priority = request.headers.get("x-priority", "normal").lower()
    if priority not in PRIORITIES:
        raise BadInput(f"X-Priority is {priority!r}: use one of {', '.join(PRIORITIES)}")
    deadline = request.headers.get("x-deadline-ms")
    try:
        due_ms = math.inf if deadline is None else float(deadline)
    except ValueError:
        due_ms = math.nan
    if not due_ms >= 0:
        raise BadInput(f"X-Deadline-Ms is {deadline!r}: give a number of ms, zero or more")
    return Scope(now_ms + due_ms, PRIORITIES[priority])
