"""What the HTTP layer sees of an engine: three verbs and two records. No torch import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from nybble.engine.request import Request, Sink
from nybble.engine.stats import EngineInfo, EngineStats

Progress = Callable[[str, float], None]
"""`progress(phase, fraction)`: what the engine is building, and how far that phase is (0 to 1)."""


class EngineProtocol(Protocol):
    """Thread-safe from any thread."""

    @property
    def info(self) -> EngineInfo: ...

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request; its deltas go to `sink` until one carries a finish.

        Raises `QueueFull`, `EngineStopped`, or `InvalidRequest` (ids out of range, no room) before queueing.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Free everything the request holds. Unknown ids are ignored; no further delta follows."""
        ...

    def stats(self) -> EngineStats: ...

    def stop(self) -> None:
        """End the loop; unfinished requests get `finish="abort"`."""
        ...
