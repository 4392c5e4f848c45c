"""The HTTP application: paths to handlers, exceptions to statuses.

In: a service. Out: an ASGI application; starting it up starts the service, shutting it down answers
what was accepted::

    app = create_app(Service(load_model("minilm"), Settings()))
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from turbotx.serving import routes, schemas
from turbotx.serving.application import health_endpoints, make_application
from turbotx.serving.bodies import SMALL_NBYTES, Shape, read_body
from turbotx.serving.incoming import check_key, read_id, read_scope
from turbotx.serving.openapi import Endpoint, array_of, describe_api, record
from turbotx.serving.refusals import BadInput, Missing
from turbotx.serving.responses import (
    answer_or_refuse,
    json_response,
    refusal_response,
    while_connected,
)
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
    document = describe_api(
        [*computing, *telling, *health_endpoints(service)], settings.url_prefix, schemas
    )
    paths: list[BaseRoute] = []
    for endpoint in computing:
        respond = _computing(service, endpoint, tracer)
        paths += [Route(path, respond, methods=["POST"]) for path in endpoint.paths]
    return make_application(service, paths, telling, document)


def _root_endpoint(service: Service) -> Endpoint:
    """Return what ``POST /`` is: the model's own use, as in text-embeddings-inference."""
    head = service.model.info.head
    ranks = "/rerank" if len(head.labels) == 1 else "/predict"
    paths = {"embedding": "/embed", "tokens": "/embed_all", "sparse": "/embed_sparse"}
    path = paths.get(head.kind, ranks)
    return next(e for e in COMPUTING if e.path == path)


def _telling_endpoints(service: Service) -> list[Endpoint]:
    def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")

    facts = {"object": "model", "owned_by": "turbotx", "created": 0}
    cards = {name: {"id": name, **facts} for name in service.models}

    def models() -> Response:
        return json_response({"object": "list", "data": list(cards.values())})

    def model(model_id: str) -> Response:
        if model_id in cards:
            return json_response(cards[model_id])
        known = ", ".join(cards)
        missing = Missing(f"there is no model {model_id!r}: this server has {known}")
        return refusal_response(missing, openai=True)

    def info() -> Response:
        return json_response(routes.describe_service(service))

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
    service: Service, endpoint: Endpoint, tracer: Any
) -> Callable[[Request], Awaitable[Response]]:
    decoder = msgspec.json.Decoder(endpoint.body)

    async def respond(request: Request) -> Response:
        begin, facts, name = time.perf_counter(), Facts(), read_id(request)
        service.metrics.requests.labels(endpoint.path).inc()
        with open_span(tracer, endpoint.path, request.headers) as span:
            work = _answer(service, endpoint, decoder, request, facts)
            response = await answer_or_refuse(work, service.metrics.failed, endpoint.openai)
            if response.status_code == 200:
                service.metrics.succeeded.labels(endpoint.path).inc()
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
        return json_response(await while_connected(request, work, settings.timeout_ms))
