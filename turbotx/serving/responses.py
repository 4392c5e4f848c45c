"""Responses: converts records and refusals to HTTP, for all applications.

In: plain data, a refusal, or work that a client waits for. Out: a response. The work is cancelled
when its client disconnects::

    return json_response(await while_connected(request, work, timeout_ms=30_000))
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable
from typing import Any, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from turbotx.serving import schemas
from turbotx.serving.interruption import Interruption
from turbotx.serving.refusals import Refusal, TimedOut

log = logging.getLogger(__name__)
Result = TypeVar("Result")
UNWATCHED_S = 0.01  # work that takes no longer ends before anybody looks whether its client left


async def while_connected(
    request: Request, work: Awaitable[Result], timeout_ms: float | None
) -> Result:
    """Await the work; cancel it if the client disconnects or the time-out passes.

    Raises ClientDisconnect, TimedOut.
    """
    watching: asyncio.Task[None] | None = None

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        waiting.end(ClientDisconnect())

    def begin() -> None:
        nonlocal watching
        watching = asyncio.ensure_future(watch())

    beginning = asyncio.get_running_loop().call_later(UNWATCHED_S, begin)
    try:
        with Interruption() as waiting:
            if timeout_ms is not None:
                late = f"not answered within {timeout_ms:.0f} ms"
                limit_s = timeout_ms / 1e3
                waiting.end_after(limit_s, TimedOut(late, retry_after_s=limit_s))
            return await work
    finally:
        beginning.cancel()
        if watching is not None:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


async def answer_or_refuse(work: Awaitable[Response], failed: Any, openai: bool) -> Response:
    """Await a response; on a refusal count its kind in `failed` and return it as a response."""
    try:
        return await work
    except Refusal as refusal:
        failed.labels(refusal.kind).inc()
        return refusal_response(refusal, openai)
    except ClientDisconnect:
        failed.labels("disconnected").inc()
        return Response(status_code=499)  # the client disconnected
    except Exception:
        failed.labels("internal").inc()
        log.exception("a request failed")
        return refusal_response(Refusal("internal error"), openai)


async def refuse_http(request: Request, error: Exception) -> Response:
    """Return Starlette's own errors, such as an unknown path, in the refusals' format."""
    assert isinstance(error, HTTPException)
    # Not request.url: it contains the client's Host header.
    body = schemas.ErrorResponse(f"{request.scope['path']}: {error.detail}", "validation")
    response = json_response(body, error.status_code)
    response.headers.update(error.headers or {})
    return response


def refusal_response(refusal: Refusal, openai: bool) -> Response:
    """Return a refusal's status and body, in OpenAI's or text-embeddings-inference's format."""
    body: Any = schemas.ErrorResponse(str(refusal), refusal.kind)
    if openai:
        body = schemas.OpenAIErrorResponse(schemas.OpenAIError(str(refusal), refusal.kind))
    response = json_response(body, refusal.status)
    if refusal.retry_after_s is not None:
        response.headers["retry-after"] = str(math.ceil(refusal.retry_after_s))
        response.headers["retry-after-ms"] = str(math.ceil(refusal.retry_after_s * 1e3))
    if refusal.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


def json_response(data: Any, status: int = 200) -> Response:
    """Return records or plain data as JSON."""
    return Response(msgspec.json.encode(data), status, media_type="application/json")
