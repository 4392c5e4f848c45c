"""The HTTP application: paths to handlers, exceptions to statuses.

In: a service. Out: an ASGI application; starting it up starts the service, shutting it down answers
what was accepted::

    app = create_app(Service(load_model("minilm"), Settings()))
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from turbotx.serving import routes, schemas
from turbotx.serving.openapi import Endpoint, array_of, describe_api, record
from turbotx.serving.refusals import BadInput, Refusal, TimedOut, TooLarge, Unauthorized
from turbotx.serving.service import Scope, Service
from turbotx.serving.tracing import find_tracer, open_span

log = logging.getLogger(__name__)
PRIORITIES = {"low": -1, "normal": 0, "high": 1}

NUMBERS = array_of({"type": "number"})
COMPUTING = (
    Endpoint("/v1/embeddings", "embeddings in OpenAI's shape", routes.embeddings,
             schemas.EmbeddingsRequest, record("EmbeddingsResponse"), openai=True),
    Endpoint("/embed", "embeddings", routes.embed, schemas.EmbedRequest, array_of(NUMBERS)),
    Endpoint("/predict", "class probabilities", routes.predict, schemas.PredictRequest,
             {"anyOf": [array_of(record("Prediction")), array_of(array_of(record("Prediction")))]}),
    Endpoint("/rerank", "texts ranked by a query", routes.rerank, schemas.RerankRequest,
             array_of(record("Rank"))),
    Endpoint("/tokenize", "tokens of a text", routes.tokenize, schemas.TokenizeRequest,
             array_of(array_of(record("Token")))),
)  # fmt: skip


def create_app(service: Service) -> Starlette:
    """The application. It accepts connections at once; ``/ready`` is 200 when it computes."""
    tracer = find_tracer(service.settings.otel)
    telling = _telling_endpoints(service)
    document = describe_api([*COMPUTING, *telling])
    telling.append(Endpoint("/openapi.json", "this description", lambda: _json(document)))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        starting = asyncio.create_task(service.start())
        starting.add_done_callback(lambda done: done.cancelled() or done.exception())
        yield
        await asyncio.wait([starting])
        await service.stop()

    app = Starlette(
        routes=[
            *(Route(e.path, _computing(service, e, tracer), methods=["POST"]) for e in COMPUTING),
            *(Route(e.path, _telling(service, e), methods=["GET"]) for e in telling),
        ],
        exception_handlers={HTTPException: _refuse_http},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


def _telling_endpoints(service: Service) -> list[Endpoint]:
    def ready() -> Response:
        accepts = service.state == "ready" and not service.leaving
        return _json({"state": service.state}, 200 if accepts else 503)

    def health() -> Response:
        failed = service.state == "failed"
        return _json({"state": service.state}, 503 if failed else 200)

    def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")

    def models() -> Response:
        card = {"id": service.model.info.name, "object": "model", "owned_by": "turbotx"}
        return _json({"object": "list", "data": [{**card, "created": 0}]})

    anything = {"type": "object"}
    return [
        Endpoint("/health", "200 while the process can answer", health, returns=anything),
        Endpoint("/ready", "200 while requests are accepted", ready, returns=anything),
        Endpoint("/metrics", "Prometheus metrics", metrics),
        Endpoint("/info", "model and limits", lambda: _json(routes.describe_service(service)),
                 returns=anything),
        Endpoint("/v1/models", "the one model, in OpenAI's shape", models, returns=anything),
    ]  # fmt: skip


def _computing(
    service: Service, endpoint: Endpoint, tracer: Any
) -> Callable[[Request], Awaitable[Response]]:
    decoder = msgspec.json.Decoder(endpoint.body)

    async def respond(request: Request) -> Response:
        begin = time.perf_counter()
        service.metrics.requests.labels(endpoint.path).inc()
        with open_span(tracer, endpoint.path, request.headers) as span:
            try:
                response = await _answer(service, endpoint, decoder, request)
                service.metrics.succeeded.labels(endpoint.path).inc()
            except Refusal as refusal:
                service.metrics.failed.labels(refusal.kind).inc()
                response = _refusal_response(refusal, endpoint.openai)
            except ClientDisconnect:
                service.metrics.failed.labels("disconnected").inc()
                response = Response(status_code=499)  # nobody reads it
            except Exception:
                service.metrics.failed.labels("internal").inc()
                log.exception("a request failed")
                response = _refusal_response(Refusal("internal error"), endpoint.openai)
            span.set_attribute("http.response.status_code", response.status_code)
        took = time.perf_counter() - begin
        service.metrics.duration.observe(took)
        fields = {"path": endpoint.path, "status": response.status_code, "ms": round(took * 1e3, 3)}
        log.info("request", extra={"fields": fields})
        return response

    return respond


async def _answer(service: Service, endpoint: Endpoint, decoder: Any, request: Request) -> Response:
    _check_key(service, request)
    text = await _read_body(request, service.settings.max_body_nbytes)
    dispatcher = service.dispatcher  # refuses while there is none
    if dispatcher.full:  # before any work is spent on it
        raise dispatcher.refuse_busy()
    scope = _read_scope(service, request, dispatcher.now_ms())
    try:
        body = decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"the body is not what {endpoint.path} takes: {error}") from error
    found = await _while_connected(
        request, endpoint.handler(service, body, scope), service.settings.timeout_ms
    )
    return _json(found)


async def _while_connected(request: Request, work: Any, timeout_ms: float) -> Any:
    """Await the work, unless its client leaves or its time is up: then it is cancelled."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, left = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait({task, left}, timeout=timeout_ms / 1e3, return_when="FIRST_COMPLETED")
        if task.done():
            return task.result()
        if left.done():
            raise ClientDisconnect
        raise TimedOut(f"not answered within {timeout_ms:.0f} ms", retry_after_s=timeout_ms / 1e3)
    finally:
        task.cancel()
        left.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _read_body(request: Request, max_nbytes: int) -> bytes:
    said = request.headers.get("content-length", "")
    parts, nbytes = [], int(said) if said.isdecimal() else 0
    if nbytes <= max_nbytes:
        nbytes = 0
        async for part in request.stream():
            parts.append(part)
            nbytes += len(part)
            if nbytes > max_nbytes:
                break
        else:
            return b"".join(parts)
    raise TooLarge(f"the body exceeds {max_nbytes} bytes")


def _check_key(service: Service, request: Request) -> None:
    keys = service.settings.api_keys
    if not keys:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    fits = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]  # all, in any case
    if scheme.lower() != "bearer" or not any(fits):
        raise Unauthorized("give the API key as 'Authorization: Bearer KEY'")


def _read_scope(service: Service, request: Request, now_ms: float) -> Scope:
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


def _telling(service: Service, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        if endpoint.path not in ("/health", "/ready", "/metrics"):
            try:
                _check_key(service, request)
            except Refusal as refusal:
                return _refusal_response(refusal, endpoint.path.startswith("/v1"))
        response: Response = endpoint.handler()
        return response

    return respond


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = schemas.ErrorResponse(f"{request.url.path}: {error.detail}", "validation")
    response = _json(body, error.status_code)
    response.headers.update(error.headers or {})
    return response


def _refusal_response(refusal: Refusal, openai: bool) -> Response:
    body: Any = schemas.ErrorResponse(str(refusal), refusal.kind)
    if openai:
        body = schemas.OpenAIErrorResponse(schemas.OpenAIError(str(refusal), refusal.kind))
    response = _json(body, refusal.status)
    if refusal.retry_after_s is not None:
        response.headers["retry-after"] = str(math.ceil(refusal.retry_after_s))
        response.headers["retry-after-ms"] = str(math.ceil(refusal.retry_after_s * 1e3))
    if refusal.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


def _json(data: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(data), status, media_type="application/json")
