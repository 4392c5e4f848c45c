"""Scale-out on Ray Serve: an HTTP front end and replicas that compute.

In: a model and settings. Out: a Ray Serve application. Each replica runs turbotx's scheduler; the
router sends similar lengths to the same replica; if a replica dies, its requests are retried::

    ray.serve.run(build_app("minilm", replicas=2, backend="eager"), route_prefix="/")
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.request_router import FIFOMixin, RequestRouter
from starlette.requests import Request
from starlette.responses import Response

from turbotx.serving.app import create_app
from turbotx.serving.engine import Head, Vectors
from turbotx.serving.model_files import LoadedModel, describe_model, load_model
from turbotx.serving.refusals import BackendFailed, Busy, Late, NotReady, Refusal
from turbotx.serving.routing import LengthRouting
from turbotx.serving.served import ModelFailed
from turbotx.serving.service import Scope, Service
from turbotx.serving.settings import Settings
from turbotx.serving.tokens import TokenRow

REFUSALS = {kind.__name__: kind for kind in (Busy, Late, NotReady, BackendFailed)}
EXPORT_S = 10.0  # interval of exporting a replica's metrics
ATTEMPTS = 3  # retries after a replica's death are safe: no side effects


def build_app(
    model: str = "minilm",
    *,
    replicas: int = 2,
    settings: Settings | None = None,
    backend: str = "turbotx",
    device: str = "cpu",
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
) -> Any:
    """Return the application for ``ray.serve.run``; options as of ``server.serve``."""
    settings = settings or Settings()
    options = {"model": model, "backend": backend, "device": device}
    deployment: Any = serve.deployment  # its overloads confuse the type checker
    router_config: Any = RequestRouterConfig
    compute = deployment(
        Replica,
        num_replicas=replicas,
        max_ongoing_requests=settings.max_queue,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        request_router_config=router_config(request_router_class=LengthAwareRouter),
    )
    front = deployment(
        Front, max_ongoing_requests=settings.max_queue, ray_actor_options={"num_cpus": 0}
    )
    computing = compute.bind({**options, "padding": settings.wanted_padding}, settings)
    return front.bind(options, settings, computing)


class LengthAwareRouter(FIFOMixin, RequestRouter):
    """Ray request router that selects replicas by ``LengthRouting``; the request's second argument
    is its length in tokens."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Create the routing state; kwargs: of `LengthRouting`."""
        self._routing = LengthRouting(**kwargs)

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """Return the replicas in order of preference for the request's length, one per rank."""
        if not candidate_replicas:
            return []
        ordered = sorted(candidate_replicas, key=lambda r: r.replica_id.unique_id)
        if pending_request is None or len(pending_request.args) < 2:
            return [ordered]
        length = int(pending_request.args[1])
        by_name = {r.replica_id.unique_id: r for r in ordered}
        names = self._routing.rank(list(by_name), length)
        return [[by_name[name]] for name in names]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """Add a request's tokens to its replica's outstanding ones."""
        if len(pending_request.args) >= 2:
            key = pending_request.metadata.internal_request_id
            self._routing.sent(replica_id.unique_id, key, int(pending_request.args[1]))

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        """Subtract a request's tokens from its replica's outstanding ones."""
        self._routing.done(internal_request_id)

    def on_replica_actor_died(self, replica_id: Any) -> None:
        """Remove a dead replica's state."""
        self._routing.forget(replica_id.unique_id)
        super().on_replica_actor_died(replica_id)


class Replica:
    """Ray actor: one engine with its scheduler, without HTTP."""

    def __init__(self, options: Mapping[str, Any], settings: Settings) -> None:
        self._service = Service(load_model(**options), settings)
        self._starting: asyncio.Task[None] | None = None
        self._exporting: asyncio.Task[None] | None = None

    async def prepare(self) -> str:
        """Measure the costs. Returns the reason if the model cannot run, else an empty string."""
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._service.start())
            self._exporting = asyncio.ensure_future(self._export())
        try:
            await asyncio.shield(self._starting)
        except ModelFailed as error:
            return str(error)
        return ""

    async def compute(
        self, rows: Sequence[TokenRow], tokens: int, due_in_ms: float, priority: int
    ) -> tuple[str, Any, Any]:
        """Return ("ok", vectors, None), or the name, message and retry_after_s of a refusal.

        tokens: read by the router. due_in_ms: relative, since machines' clocks differ.
        """
        why = await self.prepare()
        if why:
            return NotReady.__name__, why, None
        try:
            scope = Scope(self._service.dispatcher.now_ms() + due_in_ms, priority)
            return "ok", await self._service.compute(rows, scope), None
        except Refusal as refusal:
            return type(refusal).__name__, str(refusal), refusal.retry_after_s

    async def _export(self) -> None:
        gauges: dict[str, Any] = {}
        while True:
            export_samples(self._service.metrics.registry, gauges, serve.metrics.Gauge)
            await asyncio.sleep(EXPORT_S)

    def process_id(self) -> int:
        """Return the replica's process id."""
        return os.getpid()


def export_samples(registry: Any, gauges: dict[str, Any], make: Callable[..., Any]) -> None:
    """Copy every series of a Prometheus registry to a Ray gauge; Ray adds the replica's name.

    gauges: by name, reused between calls; missing ones are created by `make`. Ray exports them with
    its own metrics on each node, such as ``ray_te_queue_size``.
    """
    for family in registry.collect():
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue
            if sample.name not in gauges:
                gauges[sample.name] = make(
                    sample.name, description=family.documentation, tag_keys=tuple(sample.labels)
                )
            gauges[sample.name].set(sample.value, tags=dict(sample.labels))


class RemoteEngine:
    """Placeholder engine of the front end: has a head, does not compute."""

    packs = None

    def __init__(self, head: Head) -> None:
        self.head = head

    def run(self, rows: Sequence[TokenRow]) -> Vectors:
        """Raise NotReady: the replicas compute."""
        raise NotReady("this process does not compute: send requests to the replicas")

    def figures(self) -> Mapping[str, float]:
        """Return no gauges: the replicas export their own."""
        return {}


class RemoteQueue:
    """Placeholder dispatcher of the front end: the queues are in the replicas."""

    def full(self, priority: int) -> bool:
        """Return False: admission is decided in the replicas."""
        return False

    def now_ms(self) -> float:
        """Return the current time in ms, on the clock of deadlines."""
        return time.perf_counter() * 1e3

    def refuse_busy(self) -> Busy:
        """Return the error for a request that no replica accepts."""
        return Busy("the replicas are full", retry_after_s=1.0)


class FrontService(Service):
    """Service of the front end: tokenizes locally, computes on replicas."""

    def __init__(self, model: LoadedModel, settings: Settings, handle: Any) -> None:
        super().__init__(model, settings)
        self._handle = handle
        self._queue = RemoteQueue()

    @property
    def dispatcher(self) -> Any:
        """The placeholder queue. Raises NotReady before a replica is ready, with the reason if the
        model failed."""
        if self.state != "ready":
            raise NotReady(str(self.failure or "the replicas are loading"), retry_after_s=1.0)
        return self._queue

    async def start(self) -> None:
        """Wait until a replica is ready."""
        while self.state == "loading":
            try:
                why = await self._handle.prepare.remote()
            except (RayActorError, BackPressureError):
                await asyncio.sleep(1.0)
                continue
            self.failure = ModelFailed(why) if why else None
            self.state = "failed" if why else "ready"

    async def compute(self, rows: Sequence[TokenRow], scope: Scope) -> list[NDArray[np.float32]]:
        """Return a float32 vector per row, computed by a replica; retries if a replica dies. Raises
        NotReady, or the refusal of the replica."""
        tokens = max(len(row) for row in rows)
        due_in_ms = scope.deadline_ms - self._queue.now_ms()
        for attempt in range(ATTEMPTS):
            try:
                kind, found, retry_after_s = await self._handle.compute.remote(
                    list(rows), tokens, due_in_ms, scope.priority
                )
            except BackPressureError as error:
                raise self._queue.refuse_busy() from error
            except RayActorError as error:
                if attempt == ATTEMPTS - 1:
                    raise NotReady(
                        f"{ATTEMPTS} replicas died while computing this request", retry_after_s=1.0
                    ) from error
                continue
            if kind == "ok":
                return list(found)
            raise REFUSALS.get(kind, BackendFailed)(found, retry_after_s=retry_after_s)
        raise AssertionError("unreachable: the last attempt returns or raises")


class Front:
    """Ray deployment with the HTTP application of ``turbotx serve``."""

    def __init__(self, options: Mapping[str, Any], settings: Settings, handle: Any) -> None:
        tokenizer, info = describe_model(**options)
        model = LoadedModel(RemoteEngine(info.head), tokenizer, info)
        self._service = FrontService(model, settings, handle)
        self._app = create_app(self._service)
        self._starting: asyncio.Task[None] | None = None

    async def __call__(self, request: Request) -> Response:
        """Run the ASGI application on a request already received by Ray."""
        if self._starting is None:  # start with the first request, such as a probe of /ready
            self._starting = asyncio.ensure_future(self._service.start())
        pending = [{"type": "http.request", "body": await request.body(), "more_body": False}]
        sent: list[Any] = []

        async def receive() -> Any:
            if pending:
                return pending.pop()
            await asyncio.Event().wait()  # Ray cancels this call when the client disconnects
            raise AssertionError("unreachable")

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {**request.scope, "app": self._app}
        await self._app(scope, receive, send)
        headers = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
        body = b"".join(message.get("body", b"") for message in sent[1:])
        return Response(body, sent[0]["status"], headers)


def run(model: str = "minilm", *, port: int = 8080, **options: Any) -> Any:
    """Start the application on the local Ray and return its handle."""
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    return serve.run(build_app(model, **options), route_prefix="/")
