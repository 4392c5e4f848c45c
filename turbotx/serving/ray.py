"""Scale-out on Ray Serve: one front that speaks HTTP, replicas that compute.

In: a model and settings. Out: a Ray Serve application. Each replica has turbotx's scheduler inside,
the router sends like lengths to the same replica, a request whose replica dies goes to another::

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
EXPORT_S = 10.0  # between two looks at a replica's metrics
ATTEMPTS = 3  # a row whose replica dies is computed again: it has no side effects


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
    """Return the application to give to ``ray.serve.run``; the options are those of
    ``server.serve``."""
    settings = settings or Settings()
    options = {"model": model, "backend": backend, "device": device}
    deployment: Any = serve.deployment  # its overloads and pydantic's defeat the type checker
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
        """Begin with no knowledge of lengths; kwargs: of `LengthRouting`."""
        self._routing = LengthRouting(**kwargs)

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """Return the replicas in the order in which a request of its length tries them, one a
        rank."""
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
        """Count a request's tokens as outstanding at its replica."""
        if len(pending_request.args) >= 2:
            key = pending_request.metadata.internal_request_id
            self._routing.sent(replica_id.unique_id, key, int(pending_request.args[1]))

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        """Count a request's tokens as done."""
        self._routing.done(internal_request_id)

    def on_replica_actor_died(self, replica_id: Any) -> None:
        """Forget what was outstanding at a replica."""
        self._routing.forget(replica_id.unique_id)
        super().on_replica_actor_died(replica_id)


class Replica:
    """One engine behind one scheduler, without HTTP."""

    def __init__(self, options: Mapping[str, Any], settings: Settings) -> None:
        self._service = Service(load_model(**options), settings)
        self._starting: asyncio.Task[None] | None = None
        self._exporting: asyncio.Task[None] | None = None

    async def prepare(self) -> str:
        """Measure the costs. Returns why the model cannot run, empty where it can."""
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
        """("ok", vectors, None), or a refusal's class, message and time to return.

        ``tokens`` is for the router. The deadline is relative: machines have their own clocks.
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
        """Return the id of the process that computes."""
        return os.getpid()


def export_samples(registry: Any, gauges: dict[str, Any], make: Callable[..., Any]) -> None:
    """Set one of Ray's gauges for each series of a registry; Ray adds the replica's name.

    gauges: those made before, by name; new ones are added. Ray serves them with its own metrics,
    at each node, as ``ray_te_queue_size`` and so on.
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
    """Describes the engine that is elsewhere."""

    packs = None

    def __init__(self, head: Head) -> None:
        self.head = head

    def run(self, rows: Sequence[TokenRow]) -> Vectors:
        """Raise NotReady: the replicas compute."""
        raise NotReady("this process does not compute: its replicas do")

    def figures(self) -> Mapping[str, float]:
        """Return nothing: the replicas have figures of their own."""
        return {}


class RemoteQueue:
    """Stands where a local dispatcher would: the queues are in the replicas."""

    def full(self, priority: int) -> bool:
        """Return False: the replicas refuse by themselves."""
        return False

    def now_ms(self) -> float:
        """Return the time in ms on the clock that deadlines are stated on."""
        return time.perf_counter() * 1e3

    def refuse_busy(self) -> Busy:
        """Return the error for a request that no replica takes."""
        return Busy("the replicas are full", retry_after_s=1.0)


class FrontService(Service):
    """Tokenises here, computes there."""

    def __init__(self, model: LoadedModel, settings: Settings, handle: Any) -> None:
        super().__init__(model, settings)
        self._handle = handle
        self._queue = RemoteQueue()

    @property
    def dispatcher(self) -> Any:
        """Raises NotReady before a replica is ready, with its reason where it never will be."""
        if self.state != "ready":
            raise NotReady(str(self.failure or "the replicas are loading"), retry_after_s=1.0)
        return self._queue

    async def start(self) -> None:
        """Ready when a replica is."""
        while self.state == "loading":
            try:
                why = await self._handle.prepare.remote()
            except (RayActorError, BackPressureError):
                await asyncio.sleep(1.0)
                continue
            self.failure = ModelFailed(why) if why else None
            self.state = "failed" if why else "ready"

    async def compute(self, rows: Sequence[TokenRow], scope: Scope) -> list[NDArray[np.float32]]:
        """Return a vector for each row from a replica; tries again where a replica dies. Raises
        NotReady, or what the replica refused with. float32, one array a row."""
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
                    raise NotReady("the replicas keep dying", retry_after_s=1.0) from error
                continue
            if kind == "ok":
                return list(found)
            raise REFUSALS.get(kind, BackendFailed)(found, retry_after_s=retry_after_s)
        raise AssertionError("unreachable: the last attempt returns or raises")


class Front:
    """The HTTP application of ``turbotx serve`` in front of the replicas."""

    def __init__(self, options: Mapping[str, Any], settings: Settings, handle: Any) -> None:
        tokenizer, info = describe_model(**options)
        model = LoadedModel(RemoteEngine(info.head), tokenizer, info)
        self._service = FrontService(model, settings, handle)
        self._app = create_app(self._service)
        self._starting: asyncio.Task[None] | None = None

    async def __call__(self, request: Request) -> Response:
        """Run the application on a request that Ray has already read."""
        if self._starting is None:  # the first one, as a probe of /ready
            self._starting = asyncio.ensure_future(self._service.start())
        pending = [{"type": "http.request", "body": await request.body(), "more_body": False}]
        sent: list[Any] = []

        async def receive() -> Any:
            if pending:
                return pending.pop()
            await asyncio.Event().wait()  # Ray cancels this call when its client leaves
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
