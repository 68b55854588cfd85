"""`run`: listen, serve, and on SIGTERM let running requests finish before leaving."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn

from nybble.api.app import OnReady, create_app
from nybble.api.connection import protocol_with_deadline
from nybble.api.lifecycle import Build, Lifecycle
from nybble.api.middleware import MAX_HEADER_BYTES
from nybble.config import ServeConfig
from nybble.errors import ShuttingDown, UsageError

KEEP_ALIVE = 75
"""Seconds that an idle connection stays open: longer than the pools of clients and proxies keep theirs."""

LAST_WORDS = 2.0
"""Seconds that cut streams get to send their error event."""

log = logging.getLogger("nybble.api")


class Server(uvicorn.Server):
    """uvicorn closes the port on the first signal: too early behind a load balancer, so signals are ours."""

    def __init__(
        self, config: ServeConfig, build: Build | None = None, on_ready: OnReady | None = None
    ) -> None:
        self.failure: BaseException | None = None
        self._settings = config
        self._drain: asyncio.Task[None] | None = None
        app = create_app(config, build, on_ready=on_ready, on_failure=self._fail)
        self.lifecycle: Lifecycle = app.state.service.lifecycle
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol_with_deadline(config.header_timeout),
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=int(LAST_WORDS) + 1,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Only the main thread may; elsewhere `leave` is called instead of a signal."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.leave)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def leave(self) -> None:
        """The first call drains; the second does not wait. On the event loop's thread."""
        if self._drain is None:
            log.info("shutting down: waiting for %d requests", self.lifecycle.in_flight)
            self._drain = asyncio.get_running_loop().create_task(self._drained())
        else:
            self._drain.cancel()
            self._cut()

    async def _drained(self) -> None:
        """Not ready at once, listening a while longer, then at most `drain_timeout` for what still runs."""
        self.lifecycle.draining = True
        await asyncio.sleep(self._settings.drain_grace)
        await self._idle(self._settings.drain_timeout)
        if self.lifecycle.in_flight:
            log.warning("shutting down: ending %d requests", self.lifecycle.in_flight)
        self._cut()

    async def _idle(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.lifecycle.in_flight and time.monotonic() < end:
            await asyncio.sleep(0.05)

    def _cut(self) -> None:
        self.lifecycle.draining = True
        self.lifecycle.cut(ShuttingDown("The server is shutting down; this request was not finished."))
        self.should_exit = True

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self.should_exit = True


def run(
    config: ServeConfig,
    *,
    build: Build | None = None,
    on_listen: Callable[[int], None] | None = None,
    on_ready: OnReady | None = None,
) -> None:
    """Blocks until a signal. `on_listen` gets the port before the model loads, `on_ready` what was loaded.

    Raises what building the engine raised.
    """
    server = Server(config, build, on_ready)
    with listen(config) as sock:
        if on_listen is not None:
            on_listen(sock.getsockname()[1])
        server.run(sockets=[sock])
    if server.failure is not None:
        raise server.failure


def listen(config: ServeConfig) -> socket.socket:
    """A bound socket; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # Named as TCP: only then does asyncio turn Nagle's delay off, which would hold tokens back for 40 ms.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((config.host, config.port))
    except OSError as error:
        sock.close()
        hint = "another port: --port, or 0 for a free one"
        raise UsageError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror or error}", hint=hint
        ) from None
    sock.set_inheritable(True)
    return sock
