"""Shared base of the HTTP applications: lifespan, routes, API keys, bodies, health and metrics.

In: a service, its computing endpoints and the function that answers them. Out: the ASGI
application; its startup starts the service, its shutdown stops the service::

    app = make_application(service, COMPUTING, answer, describe, schemas)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import ModuleType
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Mount, Route

from turbotx.serving.bodies import SMALL_NBYTES
from turbotx.serving.incoming import check_key, read_id
from turbotx.serving.openapi import Endpoint, describe_api, describe_in_html
from turbotx.serving.refusals import BadInput, Missing, Refusal
from turbotx.serving.responses import json_response, refusal_response, refuse_http
from turbotx.serving.served import Served

log = logging.getLogger(__name__)
Decoder = msgspec.json.Decoder[Any]
Answer = Callable[[Endpoint, Request, Decoder], Awaitable[Response]]


def make_application(
    service: Served, computing: Sequence[Endpoint], answer: Answer,
    describe: Callable[[], dict[str, Any]], schemas: ModuleType,
) -> Starlette:  # fmt: skip
    """Return the ASGI application. It accepts connections at once; ``/ready`` is 200 once it can
    compute.

    computing: the endpoints that `answer` handles, each with a decoder for its body. describe:
    returns the JSON of ``/info``. schemas: the module of request and response records.
    """
    telling = [*_telling_endpoints(service, describe), *health_endpoints(service)]
    document = describe_api([*computing, *telling], service.settings.url_prefix, schemas)
    page = describe_in_html(document)
    telling += [
        Endpoint("/openapi.json", "this description", lambda: json_response(document)),
        Endpoint("/docs", "this description, to be read", lambda: HTMLResponse(page)),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        starting = asyncio.create_task(service.start())
        starting.add_done_callback(lambda done: done.cancelled() or done.exception())
        yield
        service.bodies.leave()
        if service.preparing:  # no request was answered yet: do not wait for the thread
            starting.cancel()
        await asyncio.wait([starting])
        await service.stop()

    paths: list[BaseRoute] = []
    for endpoint in computing:
        compute = _computing(service, endpoint, answer)
        paths += [Route(path, compute, methods=["POST"]) for path in endpoint.paths]
    for endpoint in telling:
        tell = _telling(service, endpoint)
        paths += [Route(path, tell, methods=["GET"]) for path in endpoint.paths]
    settings = service.settings
    if settings.url_prefix:
        paths = [Mount(settings.url_prefix, routes=paths)]
    cors = Middleware(
        CORSMiddleware, allow_origins=settings.cors_allow_origin, allow_methods=["GET", "POST"],
        allow_headers=["*"], expose_headers=["*"],
    )  # fmt: skip
    app = Starlette(
        routes=paths,
        exception_handlers={HTTPException: refuse_http},
        lifespan=lifespan,
        middleware=[cors] if settings.cors_allow_origin else [],
    )
    app.state.service = service
    return app


async def decode_body(service: Served, endpoint: Endpoint, decoder: Decoder, text: bytes) -> Any:
    """Return a JSON body decoded as the endpoint's record; large bodies are decoded on a thread.
    Raises BadInput if the body does not match the record."""
    try:
        large = len(text) > SMALL_NBYTES
        return await service.apart(decoder.decode, text) if large else decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"the body does not match {endpoint.path}: {error}") from error


def health_endpoints(service: Served) -> list[Endpoint]:
    """Return the endpoints of health probes: ``/health`` and ``/ready``."""

    def ready() -> Response:
        accepts = service.state == "ready" and not service.leaving
        return json_response({"state": service.state}, 200 if accepts else 503)

    def health() -> Response:
        failed = service.state == "failed"
        return json_response({"state": service.state}, 503 if failed else 200)

    anything = {"type": "object"}
    return [
        Endpoint("/health", "200 while the process can answer", health, returns=anything),
        Endpoint("/ready", "200 while requests are accepted", ready, returns=anything),
    ]


def _telling_endpoints(service: Served, describe: Callable[[], dict[str, Any]]) -> list[Endpoint]:
    def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")

    facts = {"object": "model", "owned_by": "turbotx", "created": 0}
    cards = {name: {"id": name, **facts} for name in service.names}

    def models() -> Response:
        return json_response({"object": "list", "data": list(cards.values())})

    def model(model_id: str) -> Response:
        if model_id in cards:
            return json_response(cards[model_id])
        known = ", ".join(cards)
        missing = Missing(f"there is no model {model_id!r}: this server has {known}")
        return refusal_response(missing, openai=True)

    def info() -> Response:
        return json_response(describe())

    anything = {"type": "object"}
    return [
        Endpoint("/metrics", "Prometheus metrics", metrics),
        Endpoint("/info", "model and limits", info, returns=anything),
        Endpoint("/v1/models", "the models, in OpenAI's shape", models, returns=anything,
                 aliases=("/models",)),
        Endpoint("/v1/models/{model_id:path}", "whether it is one of them", model, returns=anything,
                 aliases=("/models/{model_id:path}",)),
    ]  # fmt: skip


def _computing(
    service: Served, endpoint: Endpoint, answer: Answer
) -> Callable[[Request], Awaitable[Response]]:
    decoder: Decoder = msgspec.json.Decoder(endpoint.body)
    requests = service.metrics.requests.labels(endpoint.path)

    async def respond(request: Request) -> Response:
        begin, name = time.perf_counter(), read_id(request)
        requests.inc()
        response = await answer(endpoint, request, decoder)
        response.raw_headers.append((b"x-request-id", name.encode()))
        if log.isEnabledFor(logging.INFO):
            took_ms = round((time.perf_counter() - begin) * 1e3, 3)
            fields = {"path": endpoint.path, "status": response.status_code, "ms": took_ms}
            log.info("request", extra={"fields": {**fields, "id": name}})
        return response

    return respond


def _telling(service: Served, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        if endpoint.path not in ("/health", "/ready", "/metrics"):
            try:
                check_key(service.settings, request)
            except Refusal as refusal:
                return refusal_response(refusal, endpoint.path.startswith("/v1"))
        response: Response = endpoint.handler(**request.path_params)
        return response

    return respond
