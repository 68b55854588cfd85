"""`nybble serve`: settings, then listen, then load, then the banner."""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from nybble import banner, log, sources
from nybble.commands.flags import NONE_GIVEN, ServeFlags, given
from nybble.config import ServeConfig
from nybble.progress import Display, display

if TYPE_CHECKING:
    from nybble.api.lifecycle import Loaded
    from nybble.engine.protocol import EngineProtocol, Progress

PATIENCE = 5.0
"""Seconds that a build gets to notice that the server is leaving; between its reports it does not look."""

logger = logging.getLogger("nybble")

CONFIG_HELP = "YAML or TOML file of these settings; flags win over NYBBLE_<SETTING>, which wins over the file"


def serve(
    model: Annotated[str | None, Parameter(help="folder, .gguf file or hub id")] = None,
    /,
    *,
    config: Annotated[str | None, Parameter(help=CONFIG_HELP, metavar="FILE")] = None,
    flags: Annotated[ServeFlags, Parameter(name="*")] = NONE_GIVEN,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API; quantize it first if it is not."""
    written = given(flags) | ({"model": model} if model is not None else {})
    settings = sources.load(written, os.environ, config)
    log.configure(settings.log_level)
    from nybble.api.serve import run

    start = Start(settings, display())
    with start.shown:
        run(settings, build=start.build, on_listen=start.listens, on_ready=start.ready)
    if not start.abandon():
        sys.stderr.flush()
        os._exit(0)


class Abandoned(Exception):
    """The server is leaving before it was ready."""


class Start:
    """What is shown from the first line to the banner."""

    def __init__(self, settings: ServeConfig, shown: Display) -> None:
        self.settings, self.shown, self.port = settings, shown, settings.port
        self._leaving = threading.Event()
        self._builder: threading.Thread | None = None

    def listens(self, port: int) -> None:
        self.port = port
        logger.info("listening on %s, not ready yet", self.url)

    def build(self, settings: ServeConfig, progress: Progress) -> EngineProtocol:
        """Builds the engine; its progress goes to the probes and to the person who waits."""
        from nybble.api.app import build_engine

        def tell(phase: str, fraction: float) -> None:
            if self._leaving.is_set():
                raise Abandoned(phase)
            progress(phase, fraction)
            self.shown.update(phase, fraction)

        self._builder = threading.current_thread()
        return build_engine(settings, tell)

    def abandon(self) -> bool:
        """Ends a build that is still running, so that it can clean up; False if it does not end in time.

        The interpreter must not end under it: compiled code that still runs then aborts the process.
        """
        self._leaving.set()
        if self._builder is None:
            return True
        self._builder.join(PATIENCE)
        return not self._builder.is_alive()

    def ready(self, loaded: Loaded) -> None:
        self.shown.close()
        banner.show(loaded.info, self.settings, loaded.names, self.url)

    @property
    def url(self) -> str:
        """Where a person on this machine finds the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.settings.host, self.settings.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"
