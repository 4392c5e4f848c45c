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
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from turbotx.serving import schemas
from turbotx.serving.refusals import Refusal, TimedOut

log = logging.getLogger(__name__)


async def while_connected(request: Request, work: Any, timeout_ms: float | None) -> Any:
    """Await the work; cancel it if the client disconnects or the time-out passes.

    Raises ClientDisconnect, TimedOut.
    """

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, left = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        limit_s = None if timeout_ms is None else timeout_ms / 1e3
        await asyncio.wait({task, left}, timeout=limit_s, return_when="FIRST_COMPLETED")
        if task.done():
            return task.result()
        if left.done():
            raise ClientDisconnect
        raise TimedOut(f"not answered within {timeout_ms:.0f} ms", retry_after_s=limit_s)
    finally:
        task.cancel()
        left.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


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
