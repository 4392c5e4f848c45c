"""Request and response bodies of generation: OpenAI's completions and chat completions.

In: JSON. Out: typed records, or a msgspec.ValidationError that names the field::

    msgspec.json.decode(b'{"prompt": "Once"}', type=CompletionRequest).max_tokens      # None
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from turbotx.serving.schemas import PositiveInt, RequestBody

Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
Natural = Annotated[int, msgspec.Meta(ge=0)]


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """include_usage: send a final event with token counts."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # accepted and ignored


class GenerationRequest(RequestBody, kw_only=True):
    """Fields of both requests. Fields without an effect here are accepted."""

    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Natural | None = None
    max_tokens: PositiveInt | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=128)] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """OpenAI's ``/v1/completions``: one or several prompts, as text or token ids."""

    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: PositiveInt | None = None
    suffix: str | None = None


class TextPart(msgspec.Struct, kw_only=True):
    """A part of a message; only type "text" is supported."""

    type: str
    text: str = ""


class ChatMessage(msgspec.Struct, kw_only=True):
    """One message; content is a text or a list of text parts."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """Output format; only type "text" is supported."""

    type: str


class ChatCompletionRequest(GenerationRequest, kw_only=True):
    """OpenAI's ``/v1/chat/completions``, for models whose tokenizer has a chat template."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]
    max_completion_tokens: PositiveInt | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None


class PromptTokensDetails(msgspec.Struct, kw_only=True):
    """cached_tokens: prompt tokens whose keys and values were reused."""

    cached_tokens: int


class TokenUsage(msgspec.Struct, kw_only=True):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Per token: its text, log probability, the most probable tokens, its offset in the text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One text, or its next part in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class CompletionResponse(msgspec.Struct, kw_only=True):
    """The complete response, or one event of a stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: str = "text_completion"
    usage: TokenUsage | None = None


class TokenLogprob(msgspec.Struct, kw_only=True):
    """A token as text and bytes, with its log probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob, kw_only=True):
    """A token of the text, with the most probable alternatives."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    """Log probabilities per token."""

    content: list[ChosenLogprob]


class Said(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The assistant's message, or its next part in a stream."""

    role: str | None = None
    content: str | None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    """One message of the response."""

    index: int
    message: Said
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatResponse(msgspec.Struct, kw_only=True):
    """The complete response."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage
    object: str = "chat.completion"


class ChatDelta(msgspec.Struct, kw_only=True):
    """The next part of one message."""

    index: int
    delta: Said
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatEvent(msgspec.Struct, kw_only=True):
    """One event of a stream."""

    id: str
    created: int
    model: str
    choices: list[ChatDelta]
    object: str = "chat.completion.chunk"
    usage: TokenUsage | None = None
