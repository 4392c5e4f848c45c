"""What every HTTP application here has: its life, its paths, keys, headers for other pages.

In: a service, the routes that compute, the endpoints that tell. Out: the ASGI application; starting
it up starts the service, shutting it down stops it::

    app = make_application(service, routes, telling)
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Mount, Route

from turbotx.serving.incoming import check_key
from turbotx.serving.openapi import Endpoint, describe_in_html
from turbotx.serving.refusals import Refusal
from turbotx.serving.responses import json_response, refusal_response, refuse_http
from turbotx.serving.settings import Settings


class Served(Protocol):
    """A service as an application and the server's process know it."""

    url: str
    preparing: bool
    left: asyncio.Event
    leaving: bool

    @property
    def settings(self) -> Settings:
        """What an operator may set."""

    @property
    def state(self) -> str:
        """One of loading, ready, draining, failed."""

    @property
    def failure(self) -> Exception | None:
        """Why the model cannot run."""

    async def start(self) -> None:
        """Get ready for requests; raise where that is not possible."""

    async def stop(self) -> None:
        """Finish what was accepted."""


def make_application(
    service: Served, computing: Sequence[BaseRoute], telling: Sequence[Endpoint],
    document: dict[str, Any],
) -> Starlette:  # fmt: skip
    """Return the application. computing: routes without the prefix; document: its OpenAPI."""
    page = describe_in_html(document)
    telling = [
        *telling, *health_endpoints(service),
        Endpoint("/openapi.json", "this description", lambda: json_response(document)),
        Endpoint("/docs", "this description, to be read", lambda: HTMLResponse(page)),
    ]  # fmt: skip

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

    paths = list(computing)
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


def health_endpoints(service: Served) -> list[Endpoint]:
    """Return what probes ask for."""

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
