"""The HTTP application: paths to handlers, exceptions to statuses.

In: a service. Out: an ASGI application; starting it up starts the service, shutting it down answers
what was accepted::

    app = create_app(Service(load_model("minilm"), Settings()))
"""

from __future__ import annotations

import time
from dataclasses import replace

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from turbotx.serving import routes, schemas
from turbotx.serving.application import Decoder, decode_body, make_application
from turbotx.serving.bodies import Shape, read_body
from turbotx.serving.incoming import check_key, read_scope
from turbotx.serving.openapi import Endpoint, array_of, record
from turbotx.serving.responses import answer_or_refuse, json_response, while_connected
from turbotx.serving.service import Facts, Service
from turbotx.serving.tracing import find_tracer, open_span

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
    """Return the application of a service of embeddings, classes and ranks."""
    tracer = find_tracer(service.settings.otel)
    root = _root_endpoint(service)
    computing = [replace(e, aliases=(*e.aliases, "/")) if e is root else e for e in COMPUTING]

    async def answer(endpoint: Endpoint, request: Request, decoder: Decoder) -> Response:
        begin, facts, metrics = time.perf_counter(), Facts(), service.metrics
        with open_span(tracer, endpoint.path, request.headers) as span:
            work = _answer(service, endpoint, decoder, request, facts)
            response = await answer_or_refuse(work, metrics.failed, endpoint.openai)
            if response.status_code == 200:
                metrics.succeeded.labels(endpoint.path).inc()
            span.set_attribute("http.response.status_code", response.status_code)
        took_s = time.perf_counter() - begin
        metrics.duration.observe(took_s)
        response.raw_headers += facts.headers(took_s, service.model.info.device)
        return response

    return make_application(
        service, computing, answer, lambda: routes.describe_service(service), schemas
    )


def _root_endpoint(service: Service) -> Endpoint:
    """Return the endpoint of ``POST /``: the one for the first model's head, as in TEI."""
    head = service.model.info.head
    ranks = "/rerank" if len(head.labels) == 1 else "/predict"
    paths = {"embedding": "/embed", "tokens": "/embed_all", "sparse": "/embed_sparse"}
    path = paths.get(head.kind, ranks)
    return next(e for e in COMPUTING if e.path == path)


async def _answer(
    service: Service, endpoint: Endpoint, decoder: Decoder, request: Request, facts: Facts
) -> Response:
    check_key(service.settings, request)
    settings, items = service.settings, service.settings.max_client_batch
    with service.bodies.hold() as held:
        longest = max(m.info.max_length for m in service.models.values())
        shape = Shape(items, items * longest)
        text = await read_body(request, settings, service.bodies, held, shape)
        dispatcher = service.dispatcher  # raises NotReady while there is none
        scope = replace(read_scope(request, dispatcher.now_ms()), facts=facts)
        if dispatcher.full(scope.priority):  # checked before the inputs are tokenized
            raise dispatcher.refuse_busy()
        body = await decode_body(service, endpoint, decoder, text)
        del text  # free the raw body: `body` holds its fields
        scope = replace(scope, model=service.choose(body.model, endpoint.kind))
        work = endpoint.handler(service, body, scope)
        return json_response(await while_connected(request, work, settings.timeout_ms))
