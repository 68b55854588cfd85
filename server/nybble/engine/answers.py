"""The requests in the engine, and what goes out to them: tokens as deltas, and exactly one finish."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from nybble.engine.request import Delta, FinishReason, TokenLogprob
from nybble.engine.sampler import NanLogits, Sampler, logprob
from nybble.engine.scheduler import Scheduler
from nybble.engine.sequence import Sequence

log = logging.getLogger("nybble.engine")


class Answers:
    """Used by the engine's thread only; `lock` is held while the scheduler changes."""

    def __init__(self, scheduler: Scheduler, lock: threading.Condition) -> None:
        self._scheduler = scheduler
        self._lock = lock
        self.sequences: dict[str, Sequence] = {}
        self.samplers: dict[str, Sampler] = {}
        self.counters: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()

    def alive(self, sequence: Sequence) -> bool:
        """Whether it has not ended; another one may have its id since."""
        return self.sequences.get(sequence.id) is sequence

    def add(self, sequence: Sequence, eos: tuple[int, ...]) -> None:
        """Called with the lock held."""
        self.sequences[sequence.id] = sequence
        self.samplers[sequence.id] = Sampler(sequence.request.params, sequence.request.prompt, eos)
        self.counters["prompt_tokens"] += sequence.prompt_length
        self._scheduler.add(sequence)

    def emit(self, sequence: Sequence, token: int, logits: NDArray[np.float32] | None) -> None:
        """Add a token that was drawn from `logits`, which only log probabilities need."""
        params = sequence.request.params
        scored = None
        if params.logprobs is not None:
            assert logits is not None
            scored = logprob(logits, token, params.logprobs)
        self.counters["generation_tokens"] += 1
        if token in self.samplers[sequence.id].stops:
            self.finish(sequence, "stop")
            return
        sequence.first_token_at = sequence.first_token_at or time.monotonic()
        sequence.tokens.append(token)
        if sequence.generated >= params.max_tokens:
            self.finish(sequence, "length", token, scored)
        else:
            sequence.sink(self._delta(sequence, token, scored))

    def finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        token: int | None = None,
        scored: TokenLogprob | None = None,
        error: str | None = None,
    ) -> None:
        with self._lock:
            self.drop(sequence, reason)
        sequence.sink(self._delta(sequence, token, scored, reason, error))

    def drop(self, sequence: Sequence, reason: FinishReason) -> None:
        """End it without a word, and free what it holds. Called with the lock held."""
        self.sequences.pop(sequence.id, None)
        self.samplers.pop(sequence.id, None)
        self._scheduler.remove(sequence)
        self.finished[reason] += 1

    def fail(self, sequence: Sequence, error: Exception) -> None:
        """End one request; the others never notice."""
        log.error("request %s failed", sequence.id, exc_info=error)
        text = "an internal error ended this request"
        if isinstance(error, NanLogits):
            self.counters["nan_logits"] += 1
            text = "the model produced NaN"
        self.finish(sequence, "error", error=text)

    def _delta(
        self,
        sequence: Sequence,
        token: int | None,
        scored: TokenLogprob | None,
        finish: FinishReason | None = None,
        error: str | None = None,
    ) -> Delta:
        now = time.monotonic()
        first, sequence.answered = not sequence.answered, True
        return Delta(
            now,
            token,
            scored,
            finish,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if first and sequence.prompt_logprobs else None,
            cached_tokens=sequence.cached_tokens,
            times=sequence.times(now) if finish else None,
            error=error,
        )
