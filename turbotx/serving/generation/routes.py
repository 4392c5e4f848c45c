"""Routes of generation: OpenAI's requests to prompts, pieces to OpenAI's responses.

In: a decoded body and the service. Out: an `Answering`: one record or a stream of events. No HTTP
or JSON; refusals are exceptions::

    answering = await completions(service, body, priority=0)
    await answering.whole()                          # CompletionResponse(...)
"""

from __future__ import annotations

import inspect
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from turbotx.serving.generation.sampling import Picked, Sampling
from turbotx.serving.generation.schemas import (
    ChatChoice,
    ChatCompletionRequest,
    ChatDelta,
    ChatEvent,
    ChatLogprobs,
    ChatResponse,
    ChosenLogprob,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
    GenerationRequest,
    PromptTokensDetails,
    Said,
    TokenLogprob,
    TokenUsage,
)
from turbotx.serving.generation.sequence import Asked, Piece
from turbotx.serving.generation.service import GenerationService
from turbotx.serving.refusals import BadInput, TooLarge

MOST_STOPS = 16
DEFAULT_TOKENS = 16  # OpenAI's default of max_tokens for completions
MOST_TEXTS = 128  # per request
CHARACTERS_PER_TOKEN = 24  # an upper bound of any text's average


@dataclass
class _Text:
    """State of one generated text."""

    prompt: Sequence[int]
    asked: Asked
    echo: str = ""
    text: str = ""
    picked: list[Picked] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None
    made: int = 0
    cached: int = 0


class Answering(ABC):
    """A request in progress."""

    prefix = "cmpl"

    def __init__(
        self, service: GenerationService, body: GenerationRequest, texts: Sequence[_Text],
        priority: int,
    ) -> None:  # fmt: skip
        self._service, self._body, self._texts = service, body, list(texts)
        self.facts: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()),
            "model": service.generator.name,
        }  # fmt: skip
        self._pieces = service.generate(
            [t.prompt for t in texts], [t.asked for t in texts], priority
        )

    async def whole(self) -> Any:
        """Return the complete response."""
        async for index, piece in self._pieces:
            text = self._note(index, piece)
            text.text += piece.text
            text.finish = piece.finish
            if piece.picked is not None:
                text.picked.append(piece.picked)
        return self._answer(self._texts, self._usage())

    async def events(self) -> AsyncGenerator[Any, None]:
        """Yield the events of a streaming response."""
        options = self._body.stream_options
        counts = options is not None and bool(options.include_usage)
        begun: set[int] = set()
        async for index, piece in self._pieces:
            self._note(index, piece)
            if index not in begun:
                begun.add(index)
                for event in self._begin(index):
                    yield event
            if piece.text or piece.finish or (piece.picked and piece.picked.logprob is not None):
                yield self._event(index, piece)
        if counts:
            yield self._last(self._usage())

    async def close(self) -> None:
        """Cancel the remaining generation."""
        await self._pieces.aclose()

    def _note(self, index: int, piece: Piece) -> _Text:
        text = self._texts[index]
        text.made += piece.picked is not None
        text.cached = piece.cached
        return text

    def _usage(self) -> TokenUsage:
        n = self._body.n or 1
        prompt = sum(len(t.prompt) for t in self._texts[::n])
        made = sum(t.made for t in self._texts)
        cached = PromptTokensDetails(cached_tokens=sum(t.cached for t in self._texts[::n]))
        return TokenUsage(
            prompt_tokens=prompt, completion_tokens=made, total_tokens=prompt + made,
            prompt_tokens_details=cached,
        )  # fmt: skip

    def _show(self, token: int) -> str:
        """Return one token's text, U+FFFD for an incomplete character."""
        text: str = self._service.generator.tokenizer.backend_tokenizer.decode(
            [token], skip_special_tokens=False
        )
        return text

    @abstractmethod
    def _answer(self, texts: Sequence[_Text], usage: TokenUsage) -> Any: ...

    @abstractmethod
    def _begin(self, index: int) -> Sequence[Any]: ...

    @abstractmethod
    def _event(self, index: int, piece: Piece) -> Any: ...

    @abstractmethod
    def _last(self, usage: TokenUsage) -> Any: ...


class CompletionAnswering(Answering):
    """Responses of /v1/completions."""

    def _answer(self, texts: Sequence[_Text], usage: TokenUsage) -> CompletionResponse:
        choices = [
            CompletionChoice(
                index=i, text=t.echo + t.text, finish_reason=t.finish,
                logprobs=self._logprobs(t.picked, t, 0),
            )
            for i, t in enumerate(texts)
        ]  # fmt: skip
        return CompletionResponse(**self.facts, choices=choices, usage=usage)

    def _begin(self, index: int) -> Sequence[CompletionResponse]:
        echo = self._texts[index].echo
        if not echo:
            return ()
        return [
            CompletionResponse(**self.facts, choices=[CompletionChoice(index=index, text=echo)])
        ]

    def _event(self, index: int, piece: Piece) -> CompletionResponse:
        text = self._texts[index]
        picked = [] if piece.picked is None else [piece.picked]
        choice = CompletionChoice(
            index=index, text=piece.text, finish_reason=piece.finish,
            logprobs=self._logprobs(picked, text, len(text.text)),
        )  # fmt: skip
        text.text += piece.text
        return CompletionResponse(**self.facts, choices=[choice])

    def _last(self, usage: TokenUsage) -> CompletionResponse:
        return CompletionResponse(**self.facts, choices=[], usage=usage)

    def _logprobs(
        self, picked: Sequence[Picked], text: _Text, offset: int
    ) -> CompletionLogprobs | None:
        if text.asked.sampling.logprobs is None:
            return None
        shown = [self._show(p.token) for p in picked]
        offsets, at = [], len(text.echo) + offset
        for part in shown:
            offsets.append(at)
            at += len(part)
        return CompletionLogprobs(
            tokens=shown,
            token_logprobs=[p.logprob for p in picked],
            top_logprobs=[{self._show(t): logprob for t, logprob in p.top} for p in picked],
            text_offset=offsets,
        )


class ChatAnswering(Answering):
    """Responses of /v1/chat/completions."""

    prefix = "chatcmpl"

    def _answer(self, texts: Sequence[_Text], usage: TokenUsage) -> ChatResponse:
        choices = [
            ChatChoice(
                index=i, message=Said(role="assistant", content=t.text), finish_reason=t.finish,
                logprobs=self._logprobs(t.picked, t),
            )
            for i, t in enumerate(texts)
        ]  # fmt: skip
        return ChatResponse(**self.facts, choices=choices, usage=usage)

    def _begin(self, index: int) -> Sequence[ChatEvent]:
        delta = ChatDelta(index=index, delta=Said(role="assistant", content=""))
        return [ChatEvent(**self.facts, choices=[delta])]

    def _event(self, index: int, piece: Piece) -> ChatEvent:
        picked = [] if piece.picked is None else [piece.picked]
        delta = ChatDelta(
            index=index, delta=Said(content=piece.text), finish_reason=piece.finish,
            logprobs=self._logprobs(picked, self._texts[index]),
        )  # fmt: skip
        return ChatEvent(**self.facts, choices=[delta])

    def _last(self, usage: TokenUsage) -> ChatEvent:
        return ChatEvent(**self.facts, choices=[], usage=usage)

    def _logprobs(self, picked: Sequence[Picked], text: _Text) -> ChatLogprobs | None:
        if text.asked.sampling.logprobs is None:
            return None
        return ChatLogprobs(content=[
            ChosenLogprob(
                **self._described(p.token, p.logprob or 0.0),
                top_logprobs=[TokenLogprob(**self._described(t, x)) for t, x in p.top],
            )
            for p in picked
        ])  # fmt: skip

    def _described(self, token: int, logprob: float) -> dict[str, Any]:
        shown = self._show(token)
        return {"token": shown, "logprob": logprob, "bytes": list(shown.encode())}


async def completions(
    service: GenerationService, body: CompletionRequest, priority: int
) -> Answering:
    """Answer /v1/completions. Raises BadInput, TooLarge."""
    if body.suffix is not None:
        raise BadInput("suffix is not supported: leave it out")
    n = body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise BadInput(f"best_of is {body.best_of}: only best_of = n = {n} is supported")
    rows = await _read_prompts(service, body.prompt)
    echoes = [""] * len(rows)
    if body.echo:
        decode = service.generator.tokenizer.backend_tokenizer.decode_batch
        characters = sum(map(len, rows)) * CHARACTERS_PER_TOKEN
        echoes = await service.tokenize(characters, lambda: decode(rows, skip_special_tokens=True))
    texts = _texts(service, body, rows, body.max_tokens or DEFAULT_TOKENS, body.logprobs)
    for i, text in enumerate(texts):
        text.echo = echoes[i // n]
    return CompletionAnswering(service, body, texts, priority)


async def chat_completions(
    service: GenerationService, body: ChatCompletionRequest, priority: int
) -> Answering:
    """Answer /v1/chat/completions with the tokenizer's template. Raises BadInput, TooLarge."""
    generator = service.generator
    if not generator.has_chat_template:
        raise BadInput(
            f"the tokenizer of {generator.name} has no chat template: use /v1/completions"
        )
    if body.tools or body.tool_choice not in (None, "none"):
        raise BadInput("tools are not supported: leave tools and tool_choice out")
    if body.response_format is not None and body.response_format.type != "text":
        raise BadInput(f"response_format is {body.response_format.type!r}: only text is made")
    messages = [{"role": m.role, "content": _content(m.content)} for m in body.messages]
    values = _template_values(generator, body.chat_template_kwargs or {})

    def work() -> list[int]:
        try:
            prompt = generator.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True,
                **values,
            )  # fmt: skip
        except Exception as error:  # templates raise their own errors, such as for unknown roles
            raise BadInput(f"the chat template refuses the messages: {error}") from error
        # The template already contains the special tokens.
        return _encode(generator, prompt, special=False)

    row = await service.tokenize(sum(len(m["content"]) for m in messages), work)
    most = body.max_completion_tokens or body.max_tokens or max(generator.context - len(row), 1)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return ChatAnswering(service, body, _texts(service, body, [row], most, logprobs), priority)


async def _read_prompts(service: GenerationService, prompt: Any) -> list[list[int]]:
    """Return the token ids of a text, texts, ids or lists of ids. Raises BadInput, TooLarge."""
    items = prompt if isinstance(prompt, list) else [prompt]
    if items and all(isinstance(x, int) for x in items):
        items = [items]
    if not items or any(isinstance(x, int) for x in items):
        raise BadInput("prompt must be a text, a list of token ids, or a list of either, not empty")
    if len(items) > service.settings.max_client_batch:
        raise TooLarge(
            f"{len(items)} prompts in one request, at most {service.settings.max_client_batch}"
        )
    generator = service.generator

    def work() -> list[list[int]]:
        return [_encode(generator, x) if isinstance(x, str) else list(x) for x in items]

    rows = await service.tokenize(sum(map(len, items)), work)
    for row in rows:
        if not row:
            raise BadInput("a prompt is empty: it needs at least one token")
        if min(row) < 0 or max(row) >= generator.vocabulary:
            raise BadInput(f"token ids must lie in 0 to {generator.vocabulary - 1}")
    return rows


def _encode(generator: Any, text: str, special: bool = True) -> list[int]:
    if len(text) > generator.context * CHARACTERS_PER_TOKEN:
        raise TooLarge(
            f"a prompt has {len(text)} characters, far more than the model's {generator.context} "
            "tokens"
        )
    try:
        encoding = generator.tokenizer.backend_tokenizer.encode_batch(
            [text], add_special_tokens=special
        )[0]
    except (TypeError, UnicodeError) as error:  # lone surrogates, which JSON can carry
        raise BadInput("a prompt is not valid Unicode text") from error
    return list(encoding.ids)


def _template_values(generator: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return the template's variables. Raises BadInput for arguments of transformers, such as a
    template of the client's own."""
    own = inspect.signature(generator.tokenizer.apply_chat_template).parameters
    refused = sorted(name for name in given if name in own)
    if refused:
        raise BadInput(f"chat_template_kwargs has {refused[0]!r}: only variables of the template")
    return given


def _content(said: Any) -> str:
    if said is None or isinstance(said, str):
        return said or ""
    other = [part.type for part in said if part.type != "text"]
    if other:
        raise BadInput(f"a message has a part of type {other[0]!r}: only text is supported")
    return "".join(part.text for part in said)


def _texts(
    service: GenerationService, body: GenerationRequest, rows: Sequence[Sequence[int]],
    max_tokens: int, logprobs: int | None,
) -> list[_Text]:  # fmt: skip
    """Return the states of n texts per prompt, each with its own seed."""
    generator, n = service.generator, body.n or 1
    if len(rows) * n > MOST_TEXTS:
        raise TooLarge(f"{len(rows)} prompts with n={n}: at most {MOST_TEXTS} texts per request")
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > MOST_STOPS or not all(stops):
        raise BadInput(f"stop must be at most {MOST_STOPS} texts, none of them empty")
    sampling = _sampling(service, body, logprobs)
    ends = frozenset() if body.ignore_eos else generator.ends
    texts = []
    for row in rows:
        for k in range(n):
            own = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + k)
            texts.append(_Text(row, Asked(max_tokens, ends, stops, own)))
    return texts


def _sampling(
    service: GenerationService, body: GenerationRequest, logprobs: int | None
) -> Sampling:
    defaults = service.generator.defaults
    bias = {}
    for key, value in (body.logit_bias or {}).items():
        if not key.isdecimal() or int(key) >= service.generator.vocabulary:
            raise BadInput(f"logit_bias has {key!r}: keys must be token ids")
        bias[int(key)] = value

    def said(name: str) -> Any:
        value = getattr(body, name)
        return getattr(defaults, name) if value is None else value

    return Sampling(
        temperature=said("temperature"), top_p=said("top_p"), top_k=said("top_k"),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=bias, seed=None if body.seed is None else body.seed % (1 << 63),
        logprobs=logprobs,
    )  # fmt: skip
