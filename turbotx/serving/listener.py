"""Listener: serves one application over HTTP until SIGINT or SIGTERM.

In: a service, its application, a bound socket. Out: requests are answered until the signal; those
accepted before it are finished::

    listen(service, application, host="127.0.0.1", port=8080, listener=open_port("127.0.0.1", 8080))
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import math
import os
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn

from turbotx.serving.connections import ConnectionLimits, connection_limit, make_protocol
from turbotx.serving.served import Served
from turbotx.serving.settings import SettingsError

SWITCH_S = 0.001  # sys.setswitchinterval: how long the event loop may wait for the GIL


def listen(
    service: Served, application: Any, *, host: str, port: int, listener: socket.socket
) -> None:
    """Run an application until a signal. Raises ModelFailed if the model cannot run."""
    settings = service.settings
    shown = f"[{host}]" if ":" in host else host
    service.url = f"http://{shown}:{listener.getsockname()[1]}{settings.url_prefix}"
    limits = ConnectionLimits(
        settings.receive_timeout_ms / 1e3,
        connection_limit(settings.max_connections),
        settings.max_body_nbytes,
    )
    config = uvicorn.Config(
        application, host=host, port=port, log_config=None, access_log=False,
        timeout_keep_alive=75, timeout_graceful_shutdown=math.ceil(settings.timeout_ms / 1e3),
        http=make_protocol(limits), ws="none",
    )  # fmt: skip
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        GracefulServer(config, service, limits).run([listener])
    finally:
        sys.setswitchinterval(before_s)
    if service.failure is not None:
        raise service.failure
    if service.preparing:  # the thread cannot be stopped; no request was answered yet
        logging.shutdown()
        os._exit(0)


def open_port(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address, not listening yet. Raises SettingsError if it
    cannot."""
    if not 0 <= port < 65_536:  # getaddrinfo would wrap the number modulo 65536
        raise SettingsError(f"port {port} is not in 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except (OSError, OverflowError) as error:
        hint = "; give another port" if getattr(error, "errno", 0) == errno.EADDRINUSE else ""
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"cannot listen on {host} port {port}: {reason}{hint}") from error
    return opened


class GracefulServer(uvicorn.Server):
    """uvicorn's server with a graceful shutdown: ``/ready`` fails at the first signal, accepted
    requests are finished, the exit code is 0. It also stops if the model fails to run.
    """

    should_exit: bool
    force_exit: bool

    def __init__(self, config: uvicorn.Config, service: Served, limits: ConnectionLimits) -> None:
        super().__init__(config)
        self._service, self._limits = service, limits
        self._frozen = False

    async def on_tick(self, counter: int) -> bool:
        """Close late connections; called by uvicorn ten times a second."""
        if counter % 10 == 0:
            self._limits.close_late(asyncio.get_running_loop().time())
        if self._service.state == "ready" and not self._frozen:
            # Exclude the model's millions of objects from garbage collection.
            self._frozen = True
            gc.collect()
            gc.freeze()
        if self.should_exit:
            self._service.bodies.leave()
        return await super().on_tick(counter) or self._service.failure is not None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Refuse new requests and finish the accepted ones; a second signal stops at once."""
        self._service.leaving = True
        self.force_exit = self.should_exit  # True at the second signal
        self.should_exit = True
