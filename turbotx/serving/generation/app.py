"""The HTTP application of generation: OpenAI's paths, with JSON or server-sent-event responses.

In: a service. Out: an ASGI application; its startup starts the service, its shutdown finishes
accepted requests::

    app = create_generation_app(GenerationService(generator, settings, limits, 2 << 30))
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from turbotx.serving.application import Decoder, decode_body, make_application
from turbotx.serving.bodies import Shape, read_body
from turbotx.serving.generation import routes, schemas
from turbotx.serving.generation.routes import Answering
from turbotx.serving.generation.service import GenerationService
from turbotx.serving.generation.slots import BLOCK
from turbotx.serving.incoming import check_key, read_scope
from turbotx.serving.openapi import Endpoint, record
from turbotx.serving.refusals import Refusal
from turbotx.serving.responses import answer_or_refuse, json_response, while_connected
from turbotx.serving.schemas import OpenAIError, OpenAIErrorResponse

COMPUTING = (
    Endpoint("/v1/completions", "texts that go on from prompts", routes.completions,
             schemas.CompletionRequest, record("CompletionResponse"), openai=True,
             aliases=("/completions",)),
    Endpoint("/v1/chat/completions", "the answer to a chat", routes.chat_completions,
             schemas.ChatCompletionRequest, record("ChatResponse"), openai=True,
             aliases=("/chat/completions",)),
)  # fmt: skip


def create_generation_app(service: GenerationService) -> Starlette:
    """Return the ASGI application of a generation service."""

    def describe() -> dict[str, Any]:
        generator, limits = service.generator, service.scheduler.limits
        return {
            "model_id": generator.name, "model_dtype": generator.dtype, "device": generator.device,
            "max_length": generator.context, "chat": generator.has_chat_template,
            "max_sequences": limits.max_sequences, "cache_positions": limits.max_blocks * BLOCK,
            "prefill_tokens": limits.prefill_tokens, "max_waiting": limits.max_waiting,
            "prefix_cache": limits.prefix_cache,
        }  # fmt: skip

    async def answer(endpoint: Endpoint, request: Request, decoder: Decoder) -> Response:
        work = _answer(service, endpoint, decoder, request)
        return await answer_or_refuse(work, service.metrics.failed, openai=True)

    return make_application(service, COMPUTING, answer, describe, schemas)


async def _answer(
    service: GenerationService, endpoint: Endpoint, decoder: Decoder, request: Request
) -> Response:
    check_key(service.settings, request)
    settings, items = service.settings, service.settings.max_client_batch
    with service.bodies.hold() as held:
        shape = Shape(items, items * service.generator.context)
        text = await read_body(request, settings, service.bodies, held, shape)
        scope = read_scope(request, 0.0)
        service.worker  # noqa: B018 - raises NotReady before any work is done
        body = await decode_body(service, endpoint, decoder, text)
    answering = await endpoint.handler(service, body, scope.priority)
    if body.stream:
        return await _stream(service, request, answering)
    try:
        # The time-out is for the first token, see `GenerationService.generate`.
        return json_response(await while_connected(request, answering.whole(), None))
    finally:
        await answering.close()


async def _stream(service: GenerationService, request: Request, answering: Answering) -> Response:
    """Return a stream of events; a refusal before the first event is returned with its status."""
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
            await events.aclose()
            await answering.close()

    return StreamingResponse(
        lines(), media_type="text/event-stream", headers={"cache-control": "no-cache"}
    )


def _as_event(data: Any) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


async def _first(events: AsyncIterator[Any]) -> Any:
    return await anext(events, None)
