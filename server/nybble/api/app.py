"""`create_app`: the HTTP surface, from a config and a way to build an engine. No globals, no signals."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI

import nybble
from nybble.api import catalog, chat, completions, health, tokens
from nybble.api.auth import Auth
from nybble.api.failures import add_handlers
from nybble.api.lifecycle import Build, Lifecycle, Loaded
from nybble.api.metrics import Metrics
from nybble.api.middleware import Access, Gate, RequestLimit
from nybble.api.schema import ErrorAnswer
from nybble.api.service import Service
from nybble.config import ServeConfig
from nybble.engine.protocol import EngineProtocol, Progress
from nybble.errors import NybbleError

log = logging.getLogger("nybble.api")

OnReady = Callable[[Loaded], None]
OnFailure = Callable[[BaseException], None]


def create_app(
    config: ServeConfig,
    build: Build | None = None,
    *,
    on_ready: OnReady | None = None,
    on_failure: OnFailure | None = None,
) -> FastAPI:
    """The engine is built when the app starts, in a thread; both callbacks are called from that thread."""
    lifecycle = Lifecycle(config)
    service = Service(config, lifecycle, Metrics(lifecycle))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        lifecycle.start(build or build_engine, on_ready or _ignore, on_failure or _log_failure)
        try:
            yield
        finally:
            await asyncio.to_thread(lifecycle.stop)

    app = FastAPI(
        title="nybble",
        version=nybble.__version__,
        lifespan=lifespan,
        docs_url=None,  # the page would load scripts from elsewhere
        redoc_url=None,
        responses={"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}},
    )
    app.state.service = service
    for part in (chat, completions, catalog, tokens, health):
        app.include_router(part.router)
    add_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(RequestLimit, max_bytes=config.max_body_bytes, timeout=config.body_timeout)
    app.add_middleware(Gate, service=service)
    app.add_middleware(Auth, keys=config.keys(), metrics_open=config.metrics_open)
    app.add_middleware(Access, service=service)
    return app


def build_engine(config: ServeConfig, progress: Progress) -> EngineProtocol:
    """Imported here, as it brings torch along."""
    from nybble.engine import build

    return build.build_engine(config, progress)


def _ignore(loaded: Loaded) -> None:
    pass


def _log_failure(error: BaseException) -> None:
    if isinstance(error, NybbleError):
        log.error("%s", error.message)
    else:
        log.error("the engine could not be built", exc_info=error)
