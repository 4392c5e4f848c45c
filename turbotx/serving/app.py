"""The HTTP application: paths to handlers, exceptions to statuses.

In: a service. Out: an ASGI application; starting it up starts the service, shutting it down answers
what was accepted::

    app = create_app(Service(load_model("minilm"), Settings()))
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Mount, Route

from turbotx.serving import routes, schemas
from turbotx.serving.bodies import SMALL_NBYTES, Shape, read_body
from turbotx.serving.incoming import check_key, read_id, read_scope
from turbotx.serving.openapi import Endpoint, array_of, describe_api, describe_in_html, record
from turbotx.serving.refusals import BadInput, Missing, Refusal, TimedOut
from turbotx.serving.service import Facts, Service
from turbotx.serving.tracing import find_tracer, open_span

log = logging.getLogger(__name__)

NUMBERS = array_of({"type": "number"})
COMPUTING = (
    Endpoint("/v1/embeddings", "embeddings in OpenAI's shape", routes.embeddings,
             schemas.EmbeddingsRequest, record("EmbeddingsResponse"), openai=True, kind="embedding",
             aliases=("/embeddings",)),
    Endpoint("/embed", "embeddings", routes.embed, schemas.EmbedRequest, array_of(NUMBERS),
             kind="embedding"),
    Endpoint("/embed_all", "a vector for each token", routes.embed_all, schemas.EmbedAllRequest,
             array_of(array_of(NUMBERS)), kind="tokens"),
    Endpoint("/embed_sparse", "the words of the vocabulary that have a weight",
             routes.embed_sparse, schemas.EmbedAllRequest, array_of(array_of(record("Weight"))),
             kind="sparse"),
    Endpoint("/predict", "class probabilities", routes.predict, schemas.PredictRequest,
             {"anyOf": [array_of(record("Prediction")), array_of(array_of(record("Prediction")))]},
             kind="classifier"),
    Endpoint("/rerank", "texts ranked by a query", routes.rerank, schemas.RerankRequest,
             array_of(record("Rank")), kind="classifier"),
    Endpoint("/v1/rerank", "texts ranked by a query, in Cohere's and Jina's shape",
             routes.rerank_documents, schemas.RerankDocumentsRequest,
             record("RerankResponse"), openai=True, kind="classifier", aliases=("/v2/rerank",)),
    Endpoint("/similarity", "cosines of a sentence with others", routes.similarity,
             schemas.SimilarityRequest, NUMBERS, kind="embedding"),
    Endpoint("/tokenize", "tokens of a text", routes.tokenize, schemas.TokenizeRequest,
             array_of(array_of(record("Token")))),
    Endpoint("/decode", "texts of token ids", routes.decode, schemas.DecodeRequest,
             array_of({"type": "string"})),
)  # fmt: skip


def create_app(service: Service) -> Starlette:
    """Return the application. It accepts connections at once; ``/ready`` is 200 when it
    computes."""
    settings = service.settings
    tracer = find_tracer(settings.otel)
    telling = _telling_endpoints(service)
    root = _root_endpoint(service)
    computing = [replace(e, aliases=(*e.aliases, "/")) if e is root else e for e in COMPUTING]
    document = describe_api([*computing, *telling], settings.url_prefix)
    page = describe_in_html(document)
    telling += [
        Endpoint("/openapi.json", "this description", lambda: _json(document)),
        Endpoint("/docs", "this description, to be read", lambda: HTMLResponse(page)),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        starting = asyncio.create_task(service.start())
        starting.add_done_callback(lambda done: done.cancelled() or done.exception())
        yield
        service.left.set()
        if service.preparing:  # no request was answered yet: it is left where it is
            starting.cancel()
        await asyncio.wait([starting])
        await service.stop()

    paths: list[BaseRoute] = []
    for endpoint in computing:
        respond = _computing(service, endpoint, tracer)
        paths += [Route(path, respond, methods=["POST"]) for path in endpoint.paths]
    for endpoint in telling:
        tell = _telling(service, endpoint)
        paths += [Route(path, tell, methods=["GET"]) for path in endpoint.paths]
    if settings.url_prefix:
        paths = [Mount(settings.url_prefix, routes=paths)]
    cors = Middleware(
        CORSMiddleware, allow_origins=settings.cors_allow_origin, allow_methods=["GET", "POST"],
        allow_headers=["*"], expose_headers=["*"],
    )  # fmt: skip
    app = Starlette(
        routes=paths,
        exception_handlers={HTTPException: _refuse_http},
        lifespan=lifespan,
        middleware=[cors] if settings.cors_allow_origin else [],
    )
    app.state.service = service
    return app


def _root_endpoint(service: Service) -> Endpoint:
    """Return what ``POST /`` is: the model's own use, as in text-embeddings-inference."""
    head = service.model.info.head
    ranks = "/rerank" if len(head.labels) == 1 else "/predict"
    paths = {"embedding": "/embed", "tokens": "/embed_all", "sparse": "/embed_sparse"}
    path = paths.get(head.kind, ranks)
    return next(e for e in COMPUTING if e.path == path)


def _telling_endpoints(service: Service) -> list[Endpoint]:
    def ready() -> Response:
        accepts = service.state == "ready" and not service.leaving
        return _json({"state": service.state}, 200 if accepts else 503)

    def health() -> Response:
        failed = service.state == "failed"
        return _json({"state": service.state}, 503 if failed else 200)

    def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")

    facts = {"object": "model", "owned_by": "turbotx", "created": 0}
    cards = {name: {"id": name, **facts} for name in service.models}

    def models() -> Response:
        return _json({"object": "list", "data": list(cards.values())})

    def model(model_id: str) -> Response:
        if model_id in cards:
            return _json(cards[model_id])
        known = ", ".join(cards)
        missing = Missing(f"there is no model {model_id!r}: this server has {known}")
        return _refusal_response(missing, openai=True)

    anything = {"type": "object"}
    return [
        Endpoint("/health", "200 while the process can answer", health, returns=anything),
        Endpoint("/ready", "200 while requests are accepted", ready, returns=anything),
        Endpoint("/metrics", "Prometheus metrics", metrics),
        Endpoint("/info", "model and limits", lambda: _json(routes.describe_service(service)),
                 returns=anything),
        Endpoint("/v1/models", "the models, in OpenAI's shape", models, returns=anything,
                 aliases=("/models",)),
        Endpoint("/v1/models/{model_id:path}", "whether it is one of them", model, returns=anything,
                 aliases=("/models/{model_id:path}",)),
    ]  # fmt: skip


def _computing(
    service: Service, endpoint: Endpoint, tracer: Any
) -> Callable[[Request], Awaitable[Response]]:
    decoder = msgspec.json.Decoder(endpoint.body)

    async def respond(request: Request) -> Response:
        begin, facts, name = time.perf_counter(), Facts(), read_id(request)
        service.metrics.requests.labels(endpoint.path).inc()
        with open_span(tracer, endpoint.path, request.headers) as span:
            try:
                response = await _answer(service, endpoint, decoder, request, facts)
                service.metrics.succeeded.labels(endpoint.path).inc()
            except Refusal as refusal:
                service.metrics.failed.labels(refusal.kind).inc()
                response = _refusal_response(refusal, endpoint.openai)
            except ClientDisconnect:
                service.metrics.failed.labels("disconnected").inc()
                response = Response(status_code=499)  # the client has left
            except Exception:
                service.metrics.failed.labels("internal").inc()
                log.exception("a request failed")
                response = _refusal_response(Refusal("internal error"), endpoint.openai)
            span.set_attribute("http.response.status_code", response.status_code)
        took = time.perf_counter() - begin
        service.metrics.duration.observe(took)
        response.headers.update(facts.headers(took, service.model.info.device))
        response.headers["x-request-id"] = name
        fields = {"path": endpoint.path, "status": response.status_code, "ms": round(took * 1e3, 3)}
        log.info("request", extra={"fields": {**fields, "id": name}})
        return response

    return respond


async def _answer(
    service: Service, endpoint: Endpoint, decoder: Any, request: Request, facts: Facts
) -> Response:
    check_key(service.settings, request)
    settings, items = service.settings, service.settings.max_client_batch
    with service.bodies.hold() as held:
        longest = max(m.info.max_length for m in service.models.values())
        shape = Shape(items, items * longest)
        text = await read_body(request, settings, service.left, service.bodies, held, shape)
        dispatcher = service.dispatcher  # refuses while there is none
        scope = replace(read_scope(request, dispatcher.now_ms()), facts=facts)
        if dispatcher.full(scope.priority):  # before any work is spent on it
            raise dispatcher.refuse_busy()
        try:
            large = len(text) > SMALL_NBYTES
            body = await service.apart(decoder.decode, text) if large else decoder.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadInput(f"the body is not what {endpoint.path} takes: {error}") from error
        del text  # the record has its parts
        scope = replace(scope, model=service.choose(body.model, endpoint.kind))
        work = endpoint.handler(service, body, scope)
        return _json(await _while_connected(request, work, settings.timeout_ms))


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


def _telling(service: Service, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        if endpoint.path not in ("/health", "/ready", "/metrics"):
            try:
                check_key(service.settings, request)
            except Refusal as refusal:
                return _refusal_response(refusal, endpoint.path.startswith("/v1"))
        response: Response = endpoint.handler(**request.path_params)
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
