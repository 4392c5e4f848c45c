"""Service: loaded models, tokenizer threads and the dispatcher, without HTTP.

In: texts or token ids, and the model's name. Out: vectors, and the state shown by ``/ready``::

    service = Service(load_model("minilm"), Settings())
    await service.start()                 # measures costs, then state == "ready"
    rows = await service.encode(["hello"]); vectors = await service.compute(rows, scope)
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from turbotx.serving.cache import ResponseCache
from turbotx.serving.dispatcher import Dispatcher
from turbotx.serving.engine import TorchEngine
from turbotx.serving.idle import IdleMeasuring
from turbotx.serving.lanes import Lanes
from turbotx.serving.measure import cost_file, describe_device, load_or_measure, warm_up
from turbotx.serving.metrics import Metrics
from turbotx.serving.model_files import LoadedModel
from turbotx.serving.pending import Lane
from turbotx.serving.policies import POLICIES, Aging, Policy
from turbotx.serving.refusals import Missing, TooLarge
from turbotx.serving.scheduler import Hungry, Lazy, Scheduler
from turbotx.serving.schemas import Token
from turbotx.serving.served import Served
from turbotx.serving.settings import Settings, SettingsError
from turbotx.serving.token_costs import BatchCosts, TokenCosts
from turbotx.serving.token_policies import TOKEN_POLICIES
from turbotx.serving.tokens import CHARACTERS_PER_TOKEN, TokenRow

log = logging.getLogger(__name__)
MOST_TOKENS = 32_768  # in one response of /tokenize: about 2 MB of JSON


@dataclass
class Facts:
    """Measurements of one HTTP request, times in s."""

    characters: int = 0
    tokens: int = 0
    tokenizing_s: float = 0.0
    queueing_s: float = 0.0  # the maximum over its rows
    inference_s: float = 0.0

    def headers(self, took_s: float, device: str) -> list[tuple[bytes, bytes]]:
        """Return text-embeddings-inference's response headers, times in ms, as ASGI has them."""
        kind = b"gpu+optimized" if device.startswith("cuda") else b"cpu"
        numbers = (
            (b"x-compute-characters", self.characters),
            (b"x-compute-tokens", self.tokens),
            (b"x-total-time", round(took_s * 1e3)),
            (b"x-compute-time", round(took_s * 1e3)),
            (b"x-queue-time", round(self.queueing_s * 1e3)),
            (b"x-tokenization-time", round(self.tokenizing_s * 1e3)),
            (b"x-inference-time", round(self.inference_s * 1e3)),
        )
        return [(b"x-compute-type", kind), *((name, b"%d" % value) for name, value in numbers)]


@dataclass(frozen=True)
class Scope:
    """Deadline, priority and model of one HTTP request."""

    deadline_ms: float = math.inf
    priority: int = 0
    facts: Facts = field(default_factory=Facts)
    model: LoadedModel | None = None  # None: the first model


@dataclass(frozen=True)
class Reading:
    """How one request's texts are truncated."""

    truncate: bool | None = None  # False: long texts are an error; None: the settings' default
    keep_end: bool = False  # truncate at the beginning


class Service(Served):
    """Models that share one engine thread."""

    metrics: Metrics

    def __init__(
        self,
        model: LoadedModel | Sequence[LoadedModel],
        settings: Settings,
        costs: BatchCosts | None = None,
    ) -> None:
        """costs: of every model; None: measured."""
        models = [model] if isinstance(model, LoadedModel) else list(model)
        self.models = {m.info.name: m for m in models}
        if len(self.models) < len(models):
            names = ", ".join(m.info.name for m in models)
            raise SettingsError(f"models of one name: {names}; give --served-model-name for each")
        self.model = models[0]
        self._costs = costs
        self._tables: dict[str, BatchCosts] = {}
        self._dispatcher: Dispatcher | None = None
        super().__init__(settings, list(self.models), Metrics())

    @property
    def dispatcher(self) -> Dispatcher:
        """The dispatcher. Raises NotReady while the service does not accept requests."""
        return self.when_ready(self._dispatcher)

    async def start(self) -> None:
        """Measure the costs, unless saved for this model and device, then accept requests.

        Raises ModelFailed.
        """
        self._tables = await self.prepare(self._prepare_all)
        self._dispatcher = self._dispatch(self._tables)
        self._dispatcher.start()
        self.state = "ready"
        told = "; ".join(model.tell() for model in self.models.values())
        log.info("ready: %s, policy %s%s", told, self.settings.policy, self.url and f", {self.url}")

    def _dispatch(self, tables: dict[str, BatchCosts]) -> Dispatcher:
        settings = self.settings
        queues = {
            name: self.make_scheduler(tables[name], model) for name, model in self.models.items()
        }
        tokens = {name: model.tokenizer.any_token for name, model in self.models.items()}
        idle = IdleMeasuring(
            {name: model.engine for name, model in self.models.items()},
            tables,
            tokens,
            settings.max_age_ms / 50,
            settings.max_batch_tokens,
            finished=self._keep_costs,
        )
        return Dispatcher(
            {name: Lane(m.engine, m.info.revision) for name, m in self.models.items()},
            Lanes(queues) if len(queues) > 1 else queues[self.model.info.name],
            ResponseCache(settings.cache_nbytes),
            self.metrics,
            coalesce=settings.coalesce,
            idle=idle if self._costs is None else None,  # given costs are not measured again
        )

    async def drain(self) -> None:
        """Answer accepted requests and save the refined costs."""
        if self._dispatcher is not None:
            await self._dispatcher.drain()
            self._keep_costs()

    async def encode(
        self,
        texts: Sequence[str | tuple[str, str]],
        scope: Scope | None = None,
        reading: Reading | None = None,
    ) -> list[TokenRow]:
        """Tokenize a request's texts as one task of the pool. Raises Busy."""
        scope, reading = scope or Scope(), reading or Reading()
        tokenizer = self.model_of(scope).tokenizer
        said = reading.truncate
        truncate = self.settings.auto_truncate if said is None else said
        characters = sum(len(t) if isinstance(t, str) else sum(map(len, t)) for t in texts)

        def work() -> list[TokenRow]:
            encode = tokenizer.encode
            return [encode(text, truncate=truncate, keep_end=reading.keep_end) for text in texts]

        begin = time.perf_counter()
        rows = await self.tokenize(characters, work)
        facts = scope.facts
        facts.tokenizing_s = time.perf_counter() - begin
        facts.characters += characters
        self.metrics.tokenizing.observe(facts.tokenizing_s)
        return rows

    async def describe(
        self, texts: Sequence[str], special: bool, scope: Scope
    ) -> list[list[Token]]:
        """Return each text's tokens, for ``/tokenize``. Raises TooLarge above MOST_TOKENS in
        all."""
        model = self.model_of(scope)
        most = max(MOST_TOKENS, model.info.max_length)

        def work() -> list[list[Token]]:
            found: list[list[Token]] = []
            left = most
            try:
                for text in texts:
                    describe = model.tokenizer.describe
                    found.append(describe(text, left, add_special_tokens=special))
                    left -= len(found[-1])
            except TooLarge:
                found.clear()  # the traceback keeps this frame alive: free the tokens now
                raise
            return found

        return await self.tokenize(sum(map(len, texts)), work)

    def model_of(self, scope: Scope) -> LoadedModel:
        """Return the model of a request."""
        return scope.model or self.model

    def choose(self, name: str | None, kind: str | None) -> LoadedModel:
        """Return the model of a name; without a name the first model of the kind.

        A server of one model accepts any name, since OpenAI's clients must send one. Raises
        Missing.
        """
        if name in self.models or len(self.models) == 1:
            return self.models.get(name or "", self.model)
        if name is not None:
            raise Missing(f"no model {name!r}: this server has {', '.join(self.models)}")
        fitting = (m for m in self.models.values() if m.info.head.kind == kind)
        return next(fitting, self.model)

    def check_batch(self, count: int) -> None:
        """Raise TooLarge if a request has more than `max_client_batch` inputs."""
        if count > self.settings.max_client_batch:
            raise TooLarge(
                f"{count} inputs in one request, at most {self.settings.max_client_batch}: "
                "send them in several requests"
            )

    async def compute(self, rows: Sequence[TokenRow], scope: Scope) -> list[NDArray[np.float32]]:
        """Return a float32 vector per row; records tokens and times in the request's facts. Raises
        Busy, Late or NotReady."""
        facts = scope.facts
        facts.tokens = sum(map(len, rows))
        vectors, facts.queueing_s, facts.inference_s = await self.dispatcher.compute_timed(
            rows,
            deadline_ms=scope.deadline_ms,
            priority=scope.priority,
            model=self.model_of(scope).info.name,
        )
        return vectors

    async def decode(
        self, rows: Sequence[Sequence[int]], skip_special: bool, scope: Scope
    ) -> list[str]:
        """Return the text of each row of token ids, computed in the tokenizers' threads."""
        texts = self.model_of(scope).tokenizer.texts_of
        return await self.tokenize(
            sum(map(len, rows)) * CHARACTERS_PER_TOKEN, lambda: texts(rows, skip_special)
        )

    def figures(self) -> dict[str, float]:
        """Return gauges of the queue, the cache, the engine's memory and plans."""
        found = {"ready": float(self.state == "ready")}
        if self._dispatcher is not None:
            cache, scheduler = self._dispatcher.cache, self._dispatcher.scheduler
            found["backlog_ms"] = scheduler.backlog_ms
            found["cache_nbytes"] = float(cache.nbytes)
            found["cache_entries"] = float(len(cache))
            found["cost_observations"] = float(sum(t.observations for t in self._tables.values()))
        for model in self.models.values():  # summed over models
            for name, value in model.engine.figures().items():
                found[f"engine_{name}"] = found.get(f"engine_{name}", 0.0) + value
        return found

    def make_scheduler(self, costs: BatchCosts, model: LoadedModel | None = None) -> Scheduler:
        """Return the scheduler of the settings with a model's costs. Raises SettingsError if the
        policy is for padded batches and these are packed."""
        settings = self.settings
        max_tokens = (model or self.model).info.most_tokens(settings.max_batch_tokens)
        packed = isinstance(costs, TokenCosts)
        policies: dict[str, type[Policy]] = TOKEN_POLICIES if packed else POLICIES
        if settings.policy not in policies:
            raise SettingsError(f"the policy {settings.policy!r} needs padding 'padded'")
        policy = policies[settings.policy]()
        if isinstance(policy, Aging):
            policy = replace(policy, max_age_ms=settings.max_age_ms)
        lazy = Lazy(settings.lazy_ms, settings.max_batch, max_tokens, packed)
        return Scheduler(
            costs,
            policy,
            lazy if settings.lazy_ms else Hungry(),
            max_batch=settings.max_batch,
            max_batch_tokens=max_tokens,
            max_queue=settings.max_queue,
            max_age_ms=settings.max_age_ms,
        )

    def _prepare_all(self) -> dict[str, BatchCosts]:
        return {name: self._prepare(model) for name, model in self.models.items()}

    def _prepare(self, model: LoadedModel) -> BatchCosts:
        """Run the engine once, so that no request waits for a capture; return its costs."""
        self._prepared = model.info.name
        engine = model.engine
        if model.costs is not None:
            return self._costs or model.costs
        token = model.tokenizer.any_token
        warm_up(engine, model.info.max_length, token)
        if self._costs is not None:
            return self._costs
        path = self._cost_path(model)
        table = load_or_measure(
            path,
            engine,
            max_length=model.info.max_length,
            max_batch=self.settings.max_batch,
            max_tokens=model.info.most_tokens(self.settings.max_batch_tokens),
            token=token,
            packed=bool(engine.packs),
        )
        if path is not None:
            with contextlib.suppress(OSError):
                table.save(path, model=model.info.name)
        if isinstance(engine, TorchEngine):
            engine.keep()
        return table

    def _keep_costs(self) -> None:
        for name, table in self._tables.items():
            path = self._cost_path(self.models[name])
            if path is not None:
                with contextlib.suppress(OSError):  # read-only: measured again next time
                    table.save(path, model=name)

    def _cost_path(self, model: LoadedModel) -> Path | None:
        folder, info = self.settings.cost_folder, model.info
        if folder is None or model.costs is not None:
            return None
        what = f"{info.backend}-{info.dtype}{'-packed' if model.engine.packs else ''}"
        return cost_file(folder, info.name, info.revision, describe_device(info.device), what)
