"""From the first listening second to the last: loading, warming, ready, draining, dead."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import nybble
from nybble.config import ServeConfig
from nybble.engine.canary import Agreement, replay
from nybble.engine.protocol import EngineProtocol, Progress
from nybble.engine.stats import EngineInfo
from nybble.errors import EngineStopped, NotReady, NybbleError, ShuttingDown, UsageError
from nybble.text.tokenizer import Tokenizer

State = Literal["loading", "warming", "ready", "draining", "dead"]
Build = Callable[[ServeConfig, Progress], EngineProtocol]

STALLED_AFTER = 300.0
"""Seconds without a turn of the engine's loop until it counts as dead, though its thread is there: a chunk of
a large model's prompt takes minutes on few cores."""

log = logging.getLogger("nybble.api")


class Live(Protocol):
    """A request in flight, as far as shutting down is concerned."""

    def fail(self, error: NybbleError) -> None: ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """What exists only once the model does."""

    engine: EngineProtocol
    info: EngineInfo
    tokenizer: Tokenizer
    names: tuple[str, ...]
    fingerprint: str
    created: int
    canary: Agreement | None = None


class Lifecycle:
    """Written by the build thread and the event loop, read by every route; each write is one assignment."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self.phase, self.fraction = "starting", 0.0
        self.loaded: Loaded | None = None
        self.failure: BaseException | None = None
        self.draining = False
        self.stopped = False
        self.live: set[Live] = set()
        self.in_flight = 0

    @property
    def state(self) -> State:
        if self.failure is not None or self.stopped:
            return "dead"
        if self.draining:
            return "draining"
        if self.loaded is None:
            return "warming" if self.phase.startswith("warm") else "loading"
        return "dead" if self.stalled() else "ready"

    def stalled(self) -> bool:
        """Whether the engine's loop has stopped turning."""
        if self.loaded is None:
            return False
        stats = self.loaded.engine.stats()
        return not stats.alive or time.monotonic() - stats.heartbeat > STALLED_AFTER

    def check(self) -> None:
        """Raises unless requests are welcome."""
        match self.state:
            case "draining":
                raise ShuttingDown("The server is shutting down.")
            case "dead":
                raise EngineStopped(f"The engine is not running: {self.reason()}")
            case "loading" | "warming" as state:
                raise NotReady(f"The model is not ready yet: {state}, {self.phase} {self.fraction:.0%}.")

    def reason(self) -> str:
        if isinstance(self.failure, NybbleError):
            return self.failure.message
        return type(self.failure).__name__ if self.failure else "its loop has stopped"

    def start(
        self, build: Build, on_ready: Callable[[Loaded], None], on_failure: Callable[[BaseException], None]
    ) -> None:
        """Build in a thread of its own, so that the port answers from the first second."""

        def work() -> None:
            try:
                loaded = load(self._config, build, self.progress)
            except BaseException as exc:
                self.failure = exc
                on_failure(exc)
                return
            if self.stopped:
                loaded.engine.stop()
                return
            self.loaded = loaded
            on_ready(loaded)

        threading.Thread(target=work, name="nybble-build", daemon=True).start()

    def progress(self, phase: str, fraction: float) -> None:
        self.phase, self.fraction = phase, fraction

    def cut(self, error: NybbleError) -> None:
        """End every request in flight with this error."""
        for request in list(self.live):
            request.fail(error)

    def stop(self) -> None:
        """Blocks until the engine's loop has ended."""
        self.stopped = True
        if self.loaded is not None:
            self.loaded.engine.stop()


def load(config: ServeConfig, build: Build, progress: Progress) -> Loaded:
    engine = build(config, progress)
    info = engine.info
    tokenizer = Tokenizer.load(Path(info.directory))
    names = config.served_model_name or (Path(info.model).name or info.model,)
    try:
        canary = _canary(engine, config, progress)
    except BaseException:
        engine.stop()
        raise
    return Loaded(engine, info, tokenizer, names, fingerprint(info), int(time.time()), canary)


def _canary(engine: EngineProtocol, config: ServeConfig, progress: Progress) -> Agreement | None:
    """How far the served model agrees with the unquantized one. Raises `UsageError` if that is too little."""
    wanted = config.min_top1_agreement
    if not config.canary and not wanted:
        return None
    progress("warm-up: canary", 0.0)
    found = replay(engine, Path(engine.info.directory))
    if found is None:
        if wanted:
            raise UsageError(
                f"min_top1_agreement: {engine.info.directory} has no canary to measure it by",
                hint="`nybble quantize` writes one; or leave the setting out",
            )
        return None
    share, divergence = found.top1_agreement, found.kl_divergence
    log.info("canary: agrees on %.1f %% of %d tokens, KL %.4f", 100 * share, found.positions, divergence)
    if share < wanted:
        raise UsageError(
            f"the canary agrees with the unquantized model on {share:.1%} of its tokens, "
            f"less than min_top1_agreement {wanted:.1%}",
            hint="quantize with more bits or --method awq+gptq, or lower the setting",
        )
    return found


def fingerprint(info: EngineInfo) -> str:
    """Changes when the numbers may: version, model, quantization, kernels."""
    facts = (nybble.__version__, info.model, info.quantization, info.dtype, sorted(info.kernels.items()))
    return f"nybble-{nybble.__version__}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:8]}"
