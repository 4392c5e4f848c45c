"""The bodies of the HTTP API: OpenAI's embeddings, and text-embeddings-inference's own.

In: JSON. Out: typed records, or a msgspec.ValidationError that names the field::

    msgspec.json.decode(b'{"inputs": "hello"}', type=EmbedRequest).inputs      # 'hello'
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

PositiveInt = Annotated[int, msgspec.Meta(ge=1)]


Direction = Literal["Left", "Right", "left", "right"]


class Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request. null is as if absent; a field that is not known might change the answer."""


class EmbeddingsRequest(Body, kw_only=True):
    """OpenAI's ``/v1/embeddings``: one input or a list, as text or as token ids."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: PositiveInt | None = None
    user: str | None = None


class EmbedRequest(Body, kw_only=True):
    """``/embed``. ``normalize`` unset: as the model's files say."""

    inputs: str | list[str | int | list[int]]
    normalize: bool | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None
    dimensions: PositiveInt | None = None


class PredictRequest(Body, kw_only=True):
    """``/predict``: a text, a pair [a, b], or a list of [text] and [a, b]."""

    inputs: str | list[str | list[str]]
    raw_scores: bool | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None


class RerankRequest(Body, kw_only=True):
    """``/rerank``: score every text against the query."""

    query: str
    texts: list[str]
    raw_scores: bool | None = None
    return_text: bool | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None


class TokenizeRequest(Body, kw_only=True):
    """``/tokenize``."""

    inputs: str | list[str]
    add_special_tokens: bool | None = None
    prompt_name: str | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class EmbeddingItem(msgspec.Struct):
    embedding: list[float] | str  # str: little-endian float32 in base64
    index: int
    object: str = "embedding"


class EmbeddingsResponse(msgspec.Struct):
    data: list[EmbeddingItem]
    model: str
    usage: Usage
    object: str = "list"


class Prediction(msgspec.Struct):
    score: float
    label: str


class Rank(msgspec.Struct, omit_defaults=True):
    index: int
    score: float
    text: str | None = None


class Token(msgspec.Struct):
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
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAIErrorResponse(msgspec.Struct):
    """A refusal in OpenAI's shape, for ``/v1``."""

    error: OpenAIError
