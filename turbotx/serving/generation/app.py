"""The HTTP application of generation: OpenAI's paths, answers whole or as server-sent events.

In: a service. Out: an ASGI application; starting it up starts the service, shutting it down
finishes what was begun::

    app = create_generation_app(GenerationService(generator, settings, limits, 2 << 30))
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from turbotx.serving.application import health_endpoints, make_application
from turbotx.serving.bodies import SMALL_NBYTES, Shape, read_body
from turbotx.serving.generation import routes, schemas
from turbotx.serving.generation.routes import Answering
from turbotx.serving.generation.service import GenerationService
from turbotx.serving.incoming import check_key, read_id, read_scope
from turbotx.serving.openapi import Endpoint, describe_api, record
from turbotx.serving.refusals import BadInput, Missing, Refusal
from turbotx.serving.responses import (
    answer_or_refuse,
    json_response,
    refusal_response,
    while_connected,
)
from turbotx.serving.schemas import OpenAIError, OpenAIErrorResponse

log = logging.getLogger(__name__)
COMPUTING = (
    Endpoint("/v1/completions", "texts that go on from prompts", routes.completions,
             schemas.CompletionRequest, record("CompletionResponse"), openai=True,
             aliases=("/completions",)),
    Endpoint("/v1/chat/completions", "the answer to a chat", routes.chat_completions,
             schemas.ChatCompletionRequest, record("ChatResponse"), openai=True,
             aliases=("/chat/completions",)),
)  # fmt: skip


def create_generation_app(service: GenerationService) -> Starlette:
    """Return the application. It accepts connections at once; ``/ready`` is 200 when it
    computes."""
    telling = _telling_endpoints(service)
    document = describe_api(
        [*COMPUTING, *telling, *health_endpoints(service)], service.settings.url_prefix, schemas
    )
    paths: list[BaseRoute] = []
    for endpoint in COMPUTING:
        respond = _computing(service, endpoint)
        paths += [Route(path, respond, methods=["POST"]) for path in endpoint.paths]
    return make_application(service, paths, telling, document)


def _telling_endpoints(service: GenerationService) -> list[Endpoint]:
    def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")

    generator = service.generator
    card = {"id": generator.name, "object": "model", "owned_by": "turbotx", "created": 0}

    def models() -> Response:
        return json_response({"object": "list", "data": [card]})

    def model(model_id: str) -> Response:
        if model_id == generator.name:
            return json_response(card)
        missing = Missing(f"there is no model {model_id!r}: this server has {generator.name}")
        return refusal_response(missing, openai=True)

    def info() -> Response:
        limits = service.scheduler.limits
        return json_response({
            "model_id": generator.name, "model_dtype": generator.dtype, "device": generator.device,
            "max_length": generator.context, "chat": generator.has_chat_template,
            "max_sequences": limits.max_sequences, "cache_positions": limits.max_positions,
            "prefill_tokens": limits.prefill_tokens, "max_waiting": limits.max_waiting,
        })  # fmt: skip

    anything = {"type": "object"}
    return [
        Endpoint("/metrics", "Prometheus metrics", metrics),
        Endpoint("/info", "model and limits", info, returns=anything),
        Endpoint("/v1/models", "the model, in OpenAI's shape", models, returns=anything,
                 aliases=("/models",)),
        Endpoint("/v1/models/{model_id:path}", "whether it is this one", model, returns=anything,
                 aliases=("/models/{model_id:path}",)),
    ]  # fmt: skip


def _computing(
    service: GenerationService, endpoint: Endpoint
) -> Callable[[Request], Awaitable[Response]]:
    decoder = msgspec.json.Decoder(endpoint.body)

    async def respond(request: Request) -> Response:
        begin, name = time.perf_counter(), read_id(request)
        service.metrics.requests.labels(endpoint.path).inc()
        work = _answer(service, endpoint, decoder, request)
        response = await answer_or_refuse(work, service.metrics.failed, openai=True)
        response.headers["x-request-id"] = name
        took_ms = round((time.perf_counter() - begin) * 1e3, 3)
        fields = {"path": endpoint.path, "status": response.status_code, "ms": took_ms}
        log.info("request", extra={"fields": {**fields, "id": name}})
        return response

    return respond


async def _answer(
    service: GenerationService, endpoint: Endpoint, decoder: Any, request: Request
) -> Response:
    check_key(service.settings, request)
    settings, items = service.settings, service.settings.max_client_batch
    with service.bodies.hold() as held:
        shape = Shape(items, items * service.generator.context)
        text = await read_body(request, settings, service.left, service.bodies, held, shape)
        scope = read_scope(request, 0.0)
        service.worker  # noqa: B018 - refuses while there is none, before any work is spent
        try:
            large = len(text) > SMALL_NBYTES
            body = await service.apart(decoder.decode, text) if large else decoder.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadInput(f"the body is not what {endpoint.path} takes: {error}") from error
    answering = await endpoint.handler(service, body, scope.priority)
    if body.stream:
        return await _stream(service, request, answering)
    try:
        # Its first token is waited for so long, see `GenerationService.generate`; then all of it.
        return json_response(await while_connected(request, answering.whole(), None))
    finally:
        await answering.close()


async def _stream(service: GenerationService, request: Request, answering: Answering) -> Response:
    """Return the events; what is refused before the first one is refused with its status."""
    events = answering.events()
    first = await while_connected(request, _first(events), None)

    async def lines() -> AsyncIterator[bytes]:
        try:
            if first is not None:
                yield _as_event(first)
            async for event in events:
                yield _as_event(event)
            yield b"data: [DONE]\n\n"
        except Refusal as refusal:
            service.metrics.failed.labels(refusal.kind).inc()
            yield _as_event(OpenAIErrorResponse(OpenAIError(str(refusal), refusal.kind)))
        finally:
            await events.aclose()  # type: ignore[attr-defined]
            await answering.close()

    return StreamingResponse(
        lines(), media_type="text/event-stream", headers={"cache-control": "no-cache"}
    )


def _as_event(data: Any) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


async def _first(events: AsyncIterator[Any]) -> Any:
    return await anext(events, None)
