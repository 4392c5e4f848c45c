"""Request and response bodies: OpenAI's embeddings API and text-embeddings-inference's.

In: JSON. Out: typed records, or a msgspec.ValidationError that names the field::

    msgspec.json.decode(b'{"inputs": "hello"}', type=EmbedRequest).inputs      # 'hello'
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

PositiveInt = Annotated[int, msgspec.Meta(ge=1)]


Direction = Literal["Left", "Right", "left", "right"]


class KnownFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of request records: null means absent; unknown fields are an error."""


class RequestBody(KnownFields, kw_only=True):
    """Base of all request bodies.

    model: the model's name; a server of one model accepts any name.
    """

    model: str | None = None


class EmbeddingsRequest(RequestBody, kw_only=True):
    """OpenAI's ``/v1/embeddings``: one input or a list, as text or as token ids."""

    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: PositiveInt | None = None
    user: str | None = None


class EmbedRequest(RequestBody, kw_only=True):
    """``/embed``. normalize: None for the model's default."""

    inputs: str | list[str | int | list[int]]
    normalize: bool | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None
    dimensions: PositiveInt | None = None


class EmbedAllRequest(RequestBody, kw_only=True):
    """``/embed_all`` (a vector per token) and ``/embed_sparse`` (non-zero weights)."""

    inputs: str | list[str | int | list[int]]
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None


class PredictParameters(KnownFields, kw_only=True):
    """Parameters of Hugging Face's client: the function of the logits, and the number of labels."""

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
    """``/rerank``: texts to score against the query."""

    query: str
    texts: list[str]
    raw_scores: bool | None = None
    return_text: bool | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None


class Document(msgspec.Struct):
    """A document in Cohere's and Jina's format; only its text is used."""

    text: str


class RerankDocumentsRequest(RequestBody, kw_only=True):
    """``/v1/rerank`` in Cohere's and Jina's format; long documents are truncated."""

    query: str
    documents: list[str | Document]
    top_n: PositiveInt | None = None
    return_documents: bool | None = None


class SimilarityInputs(KnownFields, kw_only=True):
    """The source sentence and the sentences to compare with it."""

    source_sentence: str
    sentences: list[str]


class SimilarityParameters(KnownFields, kw_only=True):
    """Truncation, and the prompt to prepend to each sentence."""

    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None


class SimilarityRequest(RequestBody, kw_only=True):
    """``/similarity``: compare one sentence with others."""

    inputs: SimilarityInputs
    parameters: SimilarityParameters | None = None


class DecodeRequest(RequestBody, kw_only=True):
    """``/decode``: one list of token ids, or several."""

    ids: list[int | list[int]]
    skip_special_tokens: bool | None = None


class TokenizeRequest(RequestBody, kw_only=True):
    """``/tokenize``: texts to tokenize."""

    inputs: str | list[str]
    add_special_tokens: bool | None = None
    prompt_name: str | None = None


class Usage(msgspec.Struct):
    """Number of tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingItem(msgspec.Struct):
    """The vector of one input. index: its position in the request."""

    embedding: list[float] | str  # str: little-endian float32 in base64
    index: int
    object: str = "embedding"


class EmbeddingsResponse(msgspec.Struct):
    """Response of /v1/embeddings, one item per input."""

    data: list[EmbeddingItem]
    model: str
    usage: Usage
    object: str = "list"


class Weight(msgspec.Struct, gc=False):
    """A non-zero entry of a sparse vector: vocabulary index and weight."""

    index: int
    value: float


class Prediction(msgspec.Struct):
    """A label of a classifier and its score."""

    score: float
    label: str


class Rank(msgspec.Struct, omit_defaults=True):
    """The score of one text. index: its position in the request."""

    index: int
    score: float
    text: str | None = None


class RankedDocument(msgspec.Struct, omit_defaults=True):
    """The score of one document. index: its position in the request."""

    index: int
    relevance_score: float
    document: Document | None = None


class TotalUsage(msgspec.Struct):
    """Number of tokens of the query and all documents."""

    total_tokens: int


class RerankResponse(msgspec.Struct):
    """Response of /v1/rerank, highest score first."""

    model: str
    results: list[RankedDocument]
    usage: TotalUsage
    id: str


class Token(msgspec.Struct, gc=False):
    """A token of an input and its characters start <= i < stop; null for special tokens."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class ErrorResponse(msgspec.Struct):
    """An error in text-embeddings-inference's format."""

    error: str
    error_type: str


class OpenAIError(msgspec.Struct):
    """The error object of OpenAI's API."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAIErrorResponse(msgspec.Struct):
    """An error in OpenAI's format, for ``/v1``."""

    error: OpenAIError
