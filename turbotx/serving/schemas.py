"""The bodies of the HTTP API: OpenAI's embeddings, and text-embeddings-inference's own.

In: JSON. Out: typed records, or a msgspec.ValidationError that names the field::

    msgspec.json.decode(b'{"inputs": "hello"}', type=EmbedRequest).inputs      # 'hello'
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

PositiveInt = Annotated[int, msgspec.Meta(ge=1)]


Direction = Literal["Left", "Right", "left", "right"]


class KnownFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """null is as if absent; a field that is not known might change the answer."""


class RequestBody(KnownFields, kw_only=True):
    """A request.

    ``model``: which of several is meant; a server of one model takes any name.
    """

    model: str | None = None


class EmbeddingsRequest(RequestBody, kw_only=True):
    """OpenAI's ``/v1/embeddings``: one input or a list, as text or as token ids."""

    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: PositiveInt | None = None
    user: str | None = None


class EmbedRequest(RequestBody, kw_only=True):
    """``/embed``. ``normalize`` unset: as the model's files say."""

    inputs: str | list[str | int | list[int]]
    normalize: bool | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None
    dimensions: PositiveInt | None = None


class EmbedAllRequest(RequestBody, kw_only=True):
    """``/embed_all``, a vector for each token, and ``/embed_sparse``, the words with a weight."""

    inputs: str | list[str | int | list[int]]
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None


class PredictParameters(KnownFields, kw_only=True):
    """Of Hugging Face's client: how logits become scores, and how many are wanted."""

    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    top_k: PositiveInt | None = None


class PredictRequest(RequestBody, kw_only=True):
    """``/predict``: a text, a pair [a, b], or a list of [text] and [a, b]."""

    inputs: str | list[str | list[str]]
    parameters: PredictParameters | None = None
    raw_scores: bool | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None


class RerankRequest(RequestBody, kw_only=True):
    """``/rerank``: score every text against the query."""

    query: str
    texts: list[str]
    raw_scores: bool | None = None
    return_text: bool | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None


class Document(msgspec.Struct):
    """A document of Cohere's or Jina's; fields beside its text are not ranked by."""

    text: str


class RerankDocumentsRequest(RequestBody, kw_only=True):
    """``/v1/rerank``: Cohere's and Jina's fields. What is too long is cut."""

    query: str
    documents: list[str | Document]
    top_n: PositiveInt | None = None
    return_documents: bool | None = None


class SimilarityInputs(KnownFields, kw_only=True):
    """A sentence, and those that it is compared to."""

    source_sentence: str
    sentences: list[str]


class SimilarityParameters(KnownFields, kw_only=True):
    """How long inputs are cut, and the prompt that is put in front of each."""

    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None


class SimilarityRequest(RequestBody, kw_only=True):
    """``/similarity``: one sentence against others."""

    inputs: SimilarityInputs
    parameters: SimilarityParameters | None = None


class DecodeRequest(RequestBody, kw_only=True):
    """``/decode``: one list of token ids, or many."""

    ids: list[int | list[int]]
    skip_special_tokens: bool | None = None


class TokenizeRequest(RequestBody, kw_only=True):
    """``/tokenize``."""

    inputs: str | list[str]
    add_special_tokens: bool | None = None
    prompt_name: str | None = None


class Usage(msgspec.Struct):
    """Tokens of all inputs together."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingItem(msgspec.Struct):
    """The vector of one input, by its place in the request."""

    embedding: list[float] | str  # str: little-endian float32 in base64
    index: int
    object: str = "embedding"


class EmbeddingsResponse(msgspec.Struct):
    """Answer of /v1/embeddings, an item an input."""

    data: list[EmbeddingItem]
    model: str
    usage: Usage
    object: str = "list"


class Weight(msgspec.Struct, gc=False):
    """A word of the vocabulary, and how much it counts."""

    index: int
    value: float


class Prediction(msgspec.Struct):
    """A label of a classifier and its score."""

    score: float
    label: str


class Rank(msgspec.Struct, omit_defaults=True):
    """The score of one text against the query, by its place in the request."""

    index: int
    score: float
    text: str | None = None


class RankedDocument(msgspec.Struct, omit_defaults=True):
    """The score of one document against the query, by its place in the request."""

    index: int
    relevance_score: float
    document: Document | None = None


class TotalUsage(msgspec.Struct):
    """Tokens of the query and all documents together."""

    total_tokens: int


class RerankResponse(msgspec.Struct):
    """Answer of /v1/rerank, the highest score first."""

    model: str
    results: list[RankedDocument]
    usage: TotalUsage
    id: str


class Token(msgspec.Struct, gc=False):
    """A token of an input, and the characters start <= i < stop that it stands for; null for
    special ones."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class ErrorResponse(msgspec.Struct):
    """A refusal in text-embeddings-inference's shape."""

    error: str
    error_type: str


class OpenAIError(msgspec.Struct):
    """An error as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAIErrorResponse(msgspec.Struct):
    """A refusal in OpenAI's shape, for ``/v1``."""

    error: OpenAIError
