"""Incoming: reads key, id, scope and body of a request before its handler.

In: Starlette's request and the settings. Out: checked values, or a refusal::

    text = await read_body(request, settings, left)    # at most so many bytes, inflated if need be
"""

from __future__ import annotations

import asyncio
import hmac
import math
import uuid
import zlib

from starlette.requests import Request

from turbotx.serving.refusals import (
    BadInput,
    NotReady,
    TimedOut,
    TooLarge,
    Unauthorized,
    Unsupported,
)
from turbotx.serving.service import Scope
from turbotx.serving.settings import Settings

PRIORITIES = {"low": -1, "normal": 0, "high": 1}
INFLATERS = {"gzip": 31, "x-gzip": 31, "deflate": 47}  # zlib's wbits; 47 finds the header itself
ID_LENGTH = 128


def check_key(settings: Settings, request: Request) -> None:
    """Raise Unauthorized without one of the keys, in ``Authorization`` or ``X-API-Key``."""
    keys = settings.api_keys
    if not keys:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = request.headers.get("x-api-key", "")
    fits = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]  # all, in any case
    if not any(fits):
        raise Unauthorized("give the API key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")


def read_id(request: Request) -> str:
    """Return the client's ``X-Request-Id`` where it is short and printable, else a new one."""
    given = request.headers.get("x-request-id", "")
    fits = 0 < len(given) <= ID_LENGTH and given.isascii() and given.isprintable()
    return given if fits else uuid.uuid4().hex


def read_scope(request: Request, now_ms: float) -> Scope:
    """``X-Priority``: low, normal or high; ``X-Deadline-Ms``: how soon the answer is needed."""
    priority = request.headers.get("x-priority", "normal").lower()
    if priority not in PRIORITIES:
        raise BadInput(f"X-Priority is {priority!r}: one of {', '.join(PRIORITIES)}")
    deadline = request.headers.get("x-deadline-ms")
    try:
        due_ms = math.inf if deadline is None else float(deadline)
    except ValueError:
        due_ms = math.nan
    if not due_ms >= 0:
        raise BadInput(f"X-Deadline-Ms is {deadline!r}: a number of ms, zero or more")
    return Scope(now_ms + due_ms, PRIORITIES[priority])


async def read_body(request: Request, settings: Settings, left: asyncio.Event) -> bytes:
    """Return the whole body, inflated. Raises TooLarge as soon as it is, Unsupported, BadInput.

    A body that is not there within ``timeout_ms``, or when the server has been told to stop
    (``left``), is not waited for: NotReady, TimedOut.
    """
    reading = asyncio.ensure_future(_read(request, settings))
    leaving = asyncio.ensure_future(left.wait())
    try:
        await asyncio.wait(
            {reading, leaving}, timeout=settings.timeout_ms / 1e3, return_when="FIRST_COMPLETED"
        )
        if reading.done():
            return reading.result()
        if leaving.done():
            raise NotReady("the server is shutting down")
        raise TimedOut(f"the body was not there within {settings.timeout_ms:.0f} ms")
    finally:
        for task in (reading, leaving):
            task.cancel()
        await asyncio.gather(reading, leaving, return_exceptions=True)


def check_shape(text: bytes, most_items: int, most_numbers: int) -> None:
    """Raise TooLarge for a body that would become too many objects, without making them.

    most_items: inputs of one request, most_numbers: token ids of all of them. What stands between
    quotes is not counted.
    """
    bare = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    if bare.count(b'"') <= 2 * (16 * most_items + 64):
        outside = b"".join(bare.split(b'"')[::2])
        nested = outside.count(b"[") + outside.count(b"{")
        if nested <= 2 * most_items + 16 and outside.count(b",") <= most_numbers + most_items * 16:
            return
    raise TooLarge(f"the body has far more parts than {most_items} inputs: send several requests")


async def _read(request: Request, settings: Settings) -> bytes:
    most = settings.max_body_nbytes
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity", *INFLATERS):
        raise Unsupported(f"the body's encoding is {coding!r}: one of identity, gzip, deflate")
    inflater = zlib.decompressobj(INFLATERS[coding]) if coding in INFLATERS else None
    said = request.headers.get("content-length", "")
    parts, nbytes = [], int(said) if said.isdecimal() and len(said) < 20 else 0
    if nbytes > most or (said.isdecimal() and len(said) >= 20):
        raise _too_large(most)
    nbytes = 0
    async for part in request.stream():
        if inflater is not None:
            try:
                part = inflater.decompress(part, most + 1 - nbytes)
            except zlib.error as error:
                raise BadInput(f"the body is not {coding}: {error}") from error
        parts.append(part)
        nbytes += len(part)
        if nbytes > most:
            raise _too_large(most)
    if inflater is not None and not inflater.eof:
        raise BadInput(f"the body is not {coding}: it ends too early")
    return b"".join(parts)


def _too_large(most: int) -> TooLarge:
    return TooLarge(f"the body exceeds {most} bytes")
