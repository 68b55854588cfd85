"""When the tokens of one sequence came, observed into the histograms."""

from __future__ import annotations

import time

from nybble.api.metrics import Metrics
from nybble.engine.request import Delta, FinishReason, RequestTimes


class Clock:
    """Times are the engine's own: a busy event loop does not make the model look slow."""

    def __init__(self, metrics: Metrics, arrived: float, prompt_tokens: int) -> None:
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._arrived = arrived
        self._first = 0.0
        self._last = 0.0
        self._times: RequestTimes | None = None

    def see(self, delta: Delta) -> None:
        if delta.times is not None:
            self._times = delta.times
        if delta.token is None:
            return
        if self._first:
            self._metrics.inter_token.observe(max(delta.at - self._last, 0.0))
        else:
            self._first = delta.at
            self._metrics.first_token.observe(max(delta.at - self._arrived, 0.0))
        self._last = delta.at

    def end(self, tokens: int, reason: FinishReason) -> None:
        """Once per sequence, whatever ended it; an aborted one tells nothing about speed."""
        metrics = self._metrics
        metrics.finished[reason].inc()
        if reason in ("abort", "error"):
            return
        metrics.request.observe(time.monotonic() - self._arrived)
        metrics.prompt_tokens.observe(self._prompt_tokens)
        metrics.generation_tokens.observe(tokens)
        if tokens > 1:
            metrics.per_output_token.observe((self._last - self._first) / (tokens - 1))
        if self._times is not None:
            metrics.queue.observe(self._times.queue)
            metrics.prefill.observe(self._times.prefill)
            metrics.decode.observe(self._times.decode)
            metrics.inference.observe(self._times.prefill + self._times.decode)
