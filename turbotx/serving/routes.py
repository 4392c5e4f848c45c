"""Routes: the handlers of decoded bodies, independent of HTTP and JSON.

In: the service, a body record, the request's scope. Out: the response as a record or plain data;
refusals are exceptions::

    await embed(service, EmbedRequest(inputs="hello"), Scope())     # [[0.03, ...]]
"""

from __future__ import annotations

import base64
import math
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from turbotx import __version__
from turbotx.serving.engine import Head, normalize_rows
from turbotx.serving.model_files import LoadedModel
from turbotx.serving.refusals import BadInput, TooLarge
from turbotx.serving.schemas import (
    DecodeRequest,
    Document,
    EmbedAllRequest,
    EmbeddingItem,
    EmbeddingsRequest,
    EmbeddingsResponse,
    EmbedRequest,
    Prediction,
    PredictParameters,
    PredictRequest,
    Rank,
    RankedDocument,
    RerankDocumentsRequest,
    RerankRequest,
    RerankResponse,
    SimilarityParameters,
    SimilarityRequest,
    Token,
    TokenizeRequest,
    TotalUsage,
    Usage,
    Weight,
)
from turbotx.serving.service import Reading, Scope, Service
from turbotx.serving.settings import Settings
from turbotx.serving.tokens import TokenRow

Vector = NDArray[np.float32]
MANY_NUMBERS = 16_384  # serialized in a few ms
MOST_NUMBERS = 1 << 21  # in one response of /embed_all: about 40 MB
PATHS = {"embedding": "/embed", "classifier": "/predict or /rerank", "tokens": "/embed_all",
         "sparse": "/embed_sparse"}  # fmt: skip


async def embeddings(service: Service, body: EmbeddingsRequest, scope: Scope) -> EmbeddingsResponse:
    """Answer /v1/embeddings: texts that are too long are refused; normalization is the model's."""
    head = require_head(service, "embedding", scope)
    rows = await read_inputs(service, body.input, scope, Reading())
    vectors = await service.compute(rows, scope)
    finished = finish(vectors, head.normalize, body.dimensions)
    if body.encoding_format == "base64":
        written: list[Any] = [_to_base64(v) for v in finished]
    else:
        written = await write_rows(service, finished)
    tokens = sum(len(row) for row in rows)
    return EmbeddingsResponse(
        [EmbeddingItem(v, i) for i, v in enumerate(written)],
        service.model_of(scope).info.name,
        Usage(tokens, tokens),
    )


async def embed(service: Service, body: EmbedRequest, scope: Scope) -> list[Any]:
    """Answer /embed: a vector per input, normalized if the request or the model asks for it."""
    head = require_head(service, "embedding", scope)
    rows = await read_inputs(service, body.inputs, scope, reading_of(body), body.prompt_name)
    normalize = head.normalize if body.normalize is None else body.normalize
    vectors = await service.compute(rows, scope)
    return await write_rows(service, finish(vectors, normalize, body.dimensions))


async def embed_all(service: Service, body: EmbedAllRequest, scope: Scope) -> list[Any]:
    """Answer /embed_all: a vector per token of each input, including special tokens. Raises
    TooLarge if the response would have more than MOST_NUMBERS numbers."""
    require_head(service, "tokens", scope)
    rows = await read_inputs(service, body.inputs, scope, reading_of(body), body.prompt_name)
    numbers = sum(map(len, rows)) * service.model_of(scope).info.width
    if numbers > MOST_NUMBERS:
        raise TooLarge(f"the response would have {numbers} numbers, at most {MOST_NUMBERS}: "
                       "send several requests")  # fmt: skip
    return await write_rows(service, await service.compute(rows, scope))


async def embed_sparse(service: Service, body: EmbedAllRequest, scope: Scope) -> list[Any]:
    """Answer /embed_sparse: index and value of the non-zero weights, by index."""
    require_head(service, "sparse", scope)
    rows = await read_inputs(service, body.inputs, scope, reading_of(body), body.prompt_name)
    found = await service.compute(rows, scope)

    def write() -> list[Any]:
        pairs = (row.tolist() for row in found)
        return [[Weight(int(index), value) for index, value in row] for row in pairs]

    many = sum(row.size for row in found) > MANY_NUMBERS
    return await service.apart(write) if many else write()


async def similarity(service: Service, body: SimilarityRequest, scope: Scope) -> list[float]:
    """Answer /similarity: cosine similarity of the source with each sentence. Raises BadInput for
    an empty list."""
    require_head(service, "embedding", scope)
    if not body.inputs.sentences:
        raise BadInput("sentences is empty: give at least one to compare with")
    texts = [body.inputs.source_sentence, *body.inputs.sentences]
    options = body.parameters or SimilarityParameters()
    rows = await read_inputs(service, texts, scope, reading_of(options), options.prompt_name)
    vectors = normalize_rows(np.stack(await service.compute(rows, scope)))
    cosines: list[float] = (vectors[1:] @ vectors[0]).tolist()
    return cosines


async def predict(
    service: Service, body: PredictRequest, scope: Scope
) -> list[Prediction] | list[list[Prediction]]:
    """Answer /predict: each label's score per text or pair, highest first."""
    head = require_head(service, "classifier", scope)
    texts, single = read_pairs(body.inputs)
    service.check_batch(len(texts))
    rows = await service.encode(texts, scope, reading_of(body))
    logits = await service.compute(rows, scope)
    options = body.parameters or PredictParameters()
    function = "none" if body.raw_scores else options.function_to_apply
    found = [rank_labels(v, head, function)[: options.top_k] for v in logits]
    return found[0] if single else found


async def rerank(service: Service, body: RerankRequest, scope: Scope) -> list[Rank]:
    """Answer /rerank: the texts' scores against the query, highest first."""
    logits = await _score(service, body.query, body.texts, scope, reading_of(body))
    scores = logits if body.raw_scores else [_sigmoid(x) for x in logits]
    ranks = [
        Rank(i, score, body.texts[i] if body.return_text else None)
        for i, score in enumerate(scores)
    ]
    return sorted(ranks, key=lambda rank: -rank.score)


async def rerank_documents(
    service: Service, body: RerankDocumentsRequest, scope: Scope
) -> RerankResponse:
    """Answer /v1/rerank, Cohere's and Jina's format: documents that are too long are truncated."""
    texts = [d if isinstance(d, str) else d.text for d in body.documents]
    logits = await _score(service, body.query, texts, scope, Reading(truncate=True))
    ranks = [
        RankedDocument(i, _sigmoid(x), Document(texts[i]) if body.return_documents else None)
        for i, x in enumerate(logits)
    ]
    ranks.sort(key=lambda rank: -rank.relevance_score)
    usage = TotalUsage(scope.facts.tokens)
    name = service.model_of(scope).info.name
    return RerankResponse(name, ranks[: body.top_n], usage, uuid.uuid4().hex)


async def _score(
    service: Service, query: str, texts: Sequence[str], scope: Scope, reading: Reading
) -> list[float]:
    """Return the logit of the query paired with each text; BadInput if the model has several."""
    head = require_head(service, "classifier", scope)
    if len(head.labels) != 1:
        raise BadInput(f"this model has {len(head.labels)} classes, reranking needs one score")
    if not texts:
        raise BadInput("texts is empty: give at least one to rank")
    service.check_batch(len(texts))
    rows = await service.encode([(query, text) for text in texts], scope, reading)
    return [float(v[0]) for v in await service.compute(rows, scope)]


async def decode(service: Service, body: DecodeRequest, scope: Scope) -> list[str]:
    """Answer /decode: the text of one list of ids, or of several. Raises BadInput for a mixture."""
    kinds = {type(item) for item in body.ids}
    if kinds == {int}:
        rows: list[Any] = [body.ids]
    elif kinds <= {list}:
        rows = body.ids
    else:
        raise BadInput("ids mixes ids and lists of them: send all of one kind")
    service.check_batch(len(rows))
    return await service.decode(rows, body.skip_special_tokens is not False, scope)


async def tokenize(service: Service, body: TokenizeRequest, scope: Scope) -> list[list[Token]]:
    """Answer /tokenize: the tokens of each input with their character offsets."""
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    service.check_batch(len(texts))
    prompt = prompt_of(service, body.prompt_name, scope) if body.prompt_name else ""
    special = body.add_special_tokens is not False
    return await service.describe([prompt + text for text in texts], special, scope)


def describe_service(service: Service) -> dict[str, Any]:
    """Return the response of ``/info``: text-embeddings-inference's fields and further ones."""
    found = describe_model(service.model, service.settings)
    if len(service.models) > 1:
        others = service.models.values()
        found["models"] = [describe_model(model, service.settings) for model in others]
    return found


def describe_model(model: LoadedModel, settings: Settings) -> dict[str, Any]:
    """Return one model's part of ``/info``."""
    info = model.info
    kind: dict[str, Any]
    if info.head.kind != "classifier":
        kind = {"embedding": {"pooling": info.head.pooling}}
    elif len(info.head.labels) == 1:
        kind = {"reranker": {"id2label": {"0": info.head.labels[0]}}}
    else:
        kind = {"classifier": {"id2label": {str(i): n for i, n in enumerate(info.head.labels)}}}
    return {
        "model_id": info.name,
        "model_sha": info.revision,
        "model_dtype": info.dtype,
        "model_type": kind,
        "max_concurrent_requests": settings.max_queue,
        "max_input_length": info.max_length,
        "max_batch_tokens": settings.max_batch_tokens,
        "max_batch_requests": settings.max_batch,
        "max_client_batch_size": settings.max_client_batch,
        "auto_truncate": settings.auto_truncate,
        "tokenization_workers": settings.tokenizer_threads,
        "version": __version__,
        "policy": settings.policy,
        "padding": model.padding,
        "backend": info.backend,
        "width": info.width,
        "normalize": info.head.normalize,
        "prompt_names": list(info.prompts.texts),
    }


def require_head(service: Service, kind: str, scope: Scope) -> Head:
    """Return the model's head; raise BadInput if its kind is not the endpoint's."""
    info = service.model_of(scope).info
    if info.head.kind != kind:
        raise BadInput(f"the kind of {info.name} is {info.head.kind}: use {PATHS[info.head.kind]}")
    return info.head


def reading_of(body: Any) -> Reading:
    """Return the request's truncation settings."""
    return Reading(body.truncate, (body.truncation_direction or "right").lower() == "left")


def prompt_of(service: Service, name: str | None, scope: Scope) -> str:
    """Return the prompt to prepend to inputs. Raises BadInput for an unknown name."""
    prompts = service.model_of(scope).info.prompts
    if name is None:
        return prompts.default
    if name not in prompts.texts:
        known = ", ".join(prompts.texts) or "none"
        raise BadInput(f"prompt_name is {name!r}, the model's prompts are: {known}")
    if prompts.texts[name] and not prompts.pooled:
        raise BadInput(f"prompt_name {name!r}: this model leaves prompts out of the pooling, "
                       "which is not served")  # fmt: skip
    return prompts.texts[name]


async def read_inputs(
    service: Service,
    inputs: str | list[Any],
    scope: Scope,
    reading: Reading,
    prompt_name: str | None = None,
) -> list[TokenRow]:
    """Return token rows of a text, texts, a list of ids or lists of ids.

    The prompt is prepended to texts, not to ids. Raises BadInput for an empty or a mixed list.
    """
    prompt = prompt_of(service, prompt_name, scope)
    if isinstance(inputs, str):
        inputs = [inputs]
    if not inputs:
        raise BadInput("the input is an empty list")
    kinds = {type(item) for item in inputs}
    if kinds == {int}:
        inputs, kinds = [inputs], {list}
    service.check_batch(len(inputs))
    if kinds == {str}:
        if "" in inputs:
            raise BadInput("an input is empty: every text needs at least one character")
        return await service.encode(
            [prompt + text for text in inputs] if prompt else inputs, scope, reading
        )
    if kinds != {list}:
        raise BadInput("the input mixes texts and token ids: send all of one kind")
    if prompt_name is not None:
        raise BadInput("prompt_name is for texts: put the prompt's ids before your own")
    check = service.model_of(scope).tokenizer.check_ids
    return [check(ids) for ids in inputs]


def read_pairs(inputs: str | list[Any]) -> tuple[list[str | tuple[str, str]], bool]:
    """Return the texts and pairs of ``/predict``, and whether the input was a single one. Raises
    BadInput for anything else."""
    if isinstance(inputs, str):
        return [inputs], True
    if inputs and all(isinstance(item, str) for item in inputs):
        return [_pair_of(inputs)], True
    if not inputs or any(isinstance(item, str) for item in inputs):
        raise BadInput("inputs must be a text, a pair of texts, or a list of such lists")
    return [_pair_of(item) for item in inputs], False


def _pair_of(texts: Sequence[str]) -> str | tuple[str, str]:
    if len(texts) == 1:
        return texts[0]
    if len(texts) == 2:
        return texts[0], texts[1]
    raise BadInput(f"an input is one text or a pair, got {len(texts)} texts")


def finish(vectors: Sequence[Vector], normalize: bool, dimensions: int | None) -> Vector:
    """Stack vectors, truncate to ``dimensions``, then normalize. Raises BadInput if the model has
    fewer dimensions."""
    stacked = np.stack(vectors)
    if dimensions is not None:
        if dimensions > stacked.shape[1]:
            raise BadInput(f"dimensions is {dimensions}, the model has {stacked.shape[1]}")
        stacked = stacked[:, :dimensions]
    return normalize_rows(stacked) if normalize else stacked


async def write_rows(service: Service, rows: Vector | Sequence[Vector]) -> list[Any]:
    """Return the rows as lists; large results as JSON, serialized on a thread."""
    if sum(row.size for row in rows) <= MANY_NUMBERS:
        return [row.tolist() for row in rows]

    def write() -> list[Any]:
        return [msgspec.Raw(msgspec.json.encode(row.tolist())) for row in rows]

    return await service.apart(write)


def rank_labels(logits: Vector, head: Head, function: str | None) -> list[Prediction]:
    """Return the labels' scores, highest first.

    function: "none", "sigmoid" or "softmax" of the logits; None: the model's own."""
    if function is None:
        function = "sigmoid" if head.sigmoid or len(logits) == 1 else "softmax"
    if function == "none":
        scores = logits
    elif function == "sigmoid":
        scores = np.array([_sigmoid(float(x)) for x in logits], dtype=np.float32)
    else:
        shifted = np.exp(logits - logits.max())
        scores = shifted / shifted.sum()
    order = np.argsort(-scores, kind="stable")
    return [Prediction(float(scores[i]), head.labels[i]) for i in order]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _to_base64(vector: Vector) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
