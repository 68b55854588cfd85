"""The loop: requests in, deltas out. One thread owns the scheduler and the runner."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from nybble.engine.block_pool import BlockPool
from nybble.engine.request import Delta, FinishReason, Request, Sink, TokenLogprob
from nybble.engine.runner import Runner
from nybble.engine.sampler import NanLogits, Sampler, logprob
from nybble.engine.scheduler import Chunk, Scheduler
from nybble.engine.sequence import Sequence
from nybble.engine.stats import EngineInfo, EngineStats
from nybble.errors import ContextLengthExceeded, EngineStopped, InvalidRequest, QueueFull

log = logging.getLogger("nybble.engine")

IDLE_SECONDS = 0.5  # how often an idle loop shows that it lives


class Engine:
    """Continuous batching over a paged cache. `submit`, `abort` and `stats` may be called from any thread."""

    def __init__(
        self,
        info: EngineInfo,
        runner: Runner,
        *,
        max_sequences: int = 32,
        max_tokens: int = 512,
        max_queue: int = 256,
        prefix_cache: bool = True,
    ) -> None:
        self.info = info
        self._runner = runner
        self._pool = BlockPool(info.num_blocks)
        self._scheduler = Scheduler(
            self._pool,
            block_size=info.block_size,
            max_sequences=max_sequences,
            max_tokens=max_tokens,
            prefix_cache=prefix_cache,
        )
        self._max_queue = max_queue
        self._inbox: deque[Sequence | str] = deque()  # new sequences, and ids to abort, in order of arrival
        self._queued = 0  # sequences in the inbox
        self._wake = threading.Condition()
        self._stopping = False
        self._sequences: dict[str, Sequence] = {}
        self._samplers: dict[str, Sampler] = {}
        self._counters: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._decode_seconds = 0.0
        self._heartbeat = time.monotonic()
        self._thread = threading.Thread(target=self._loop, name="nybble-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()
        atexit.register(self.stop)  # a step must not run on while the interpreter is taken apart

    def submit(self, request: Request, sink: Sink) -> None:
        self._check(request)
        sequence = Sequence(request, sink, list(request.prompt))
        with self._wake:
            if self._stopping or not self._thread.is_alive():
                raise EngineStopped("the engine has stopped")
            if self._queued + len(self._scheduler.waiting) >= self._max_queue:
                raise QueueFull(f"{self._max_queue} requests are waiting already")
            self._queued += 1
            self._inbox.append(sequence)
            self._wake.notify()

    def _check(self, request: Request) -> None:
        room, wanted = self.info.max_model_len, len(request.prompt) + request.params.max_tokens
        if not request.prompt:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        if wanted > room:
            raise ContextLengthExceeded.of(room, len(request.prompt), request.params.max_tokens, "prompt")
        ids = (*request.prompt, *request.params.logit_bias, *request.params.stop_token_ids)
        if min(ids) < 0 or max(ids) >= self.info.vocab_size:
            raise InvalidRequest(f"token ids must lie in [0, {self.info.vocab_size})", param="prompt")

    def abort(self, request_id: str) -> None:
        with self._wake:
            self._inbox.append(request_id)
            self._wake.notify()

    def stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()
        atexit.unregister(self.stop)

    def stats(self) -> EngineStats:
        scheduler, pool, count = self._scheduler, self._pool, self._counters
        with self._wake:  # the loop changes the pool only while it holds this lock
            return EngineStats(
                running=len(scheduler.running),
                waiting=len(scheduler.waiting) + self._queued,
                blocks_live=pool.live,
                blocks_cached=pool.cached,
                blocks_free=pool.free,
                blocks_total=pool.total,
                prefix_query_tokens=scheduler.prefix_query_tokens,
                prefix_hit_tokens=scheduler.prefix_hit_tokens,
                preemptions=scheduler.preemptions,
                prompt_tokens=count["prompt_tokens"],
                generation_tokens=count["generation_tokens"],
                requests_finished=dict(self._finished),
                steps=count["steps"],
                step_tokens=count["step_tokens"],
                decode_steps=count["decode_steps"],
                decode_seconds=self._decode_seconds,
                decode_bytes=count["decode_bytes"],
                nan_logits=count["nan_logits"],
                used_bytes=dict(self._runner.used_bytes()),
                alive=self._thread.is_alive() and not self._stopping,
                heartbeat=self._heartbeat,
            )

    def _loop(self) -> None:
        try:
            while not self._stopping:
                self.step()
        except Exception:
            log.exception("the engine loop failed")
        finally:
            self._stopping = True
            for sequence in list(self._sequences.values()):
                self._finish(sequence, "abort")
            with self._wake:
                pending = [s for s in self._inbox if isinstance(s, Sequence)]
                self._inbox.clear()
            for sequence in pending:
                sequence.sink(Delta(time.monotonic(), finish="abort"))

    def step(self) -> None:
        """One turn: take what came in, move every decoding sequence by a token, then prompts by a chunk."""
        with self._wake:
            if not self._inbox and not self._sequences and not self._stopping:
                self._wake.wait(IDLE_SECONDS)
            self._heartbeat = time.monotonic()
            arrived, self._queued = list(self._inbox), 0
            self._inbox.clear()
            for item in arrived:
                self._take(item)
            plan = self._scheduler.plan()
        if not plan.tokens:
            return
        self._counters["steps"] += 1
        self._counters["step_tokens"] += plan.tokens
        if plan.decode:
            self._decode(plan.decode)
        for chunk in plan.prefill:
            self._prefill(chunk)

    def _take(self, item: Sequence | str) -> None:
        if isinstance(item, str):
            sequence = self._sequences.pop(item, None)
            if sequence is not None:
                self._drop(sequence, "abort")
        elif item.id in self._sequences:
            item.sink(Delta(time.monotonic(), finish="error", error=f"request id {item.id!r} is in use"))
        else:
            self._sequences[item.id] = item
            self._samplers[item.id] = Sampler(
                item.request.params, item.request.prompt, self.info.eos_token_ids
            )
            self._counters["prompt_tokens"] += item.prompt_length
            self._scheduler.add(item)

    def _prefill(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        tokens = sequence.tokens[chunk.start : chunk.stop]
        try:
            if sequence.request.params.prompt_logprobs and len(sequence.prompt_logprobs) <= chunk.stop:
                self._score(sequence, tokens, chunk.start)
            else:
                self._runner.prefill(tokens, chunk.start, sequence.blocks)
        except Exception as error:
            self._fail(sequence, error)
            return
        with self._wake:
            self._scheduler.commit(sequence, chunk.stop)
        if not sequence.prefilling and sequence.request.params.max_tokens == 0:
            self._finish(sequence, "length")

    def _score(self, sequence: Sequence, tokens: list[int], start: int) -> None:
        logits = self._runner.score(tokens, start, sequence.blocks)
        scored = sequence.prompt_logprobs = sequence.prompt_logprobs or [None]
        top = sequence.request.params.logprobs or 0
        for row in range(len(scored) - 1 - start, len(tokens)):  # a preempted prompt may have a part already
            scored.append(logprob(logits[row], sequence.tokens[start + row + 1], top))

    def _decode(self, batch: list[Sequence]) -> None:
        started = time.perf_counter()
        try:
            logits = self._run(batch)
        except Exception as error:
            if len(batch) == 1:
                self._fail(batch[0], error)
            else:
                for sequence in batch:  # find out whose fault it is: the others go on
                    self._decode([sequence])
            return
        self._decode_seconds += time.perf_counter() - started
        self._counters["decode_steps"] += 1
        self._counters["decode_bytes"] += self._runner.decode_bytes([s.computed for s in batch])
        for sequence, row in zip(batch, logits, strict=True):
            self._advance(sequence, row)

    def _run(self, batch: Seq[Sequence]) -> NDArray[np.float32]:
        return self._runner.decode(
            [s.tokens[s.computed] for s in batch], [s.computed for s in batch], [s.blocks for s in batch]
        )

    def _advance(self, sequence: Sequence, logits: NDArray[np.float32]) -> None:
        """Take the step's result for one sequence: a replayed position, or a new token."""
        new = sequence.at_last_token
        with self._wake:
            self._scheduler.commit(sequence, sequence.computed + 1)
        if not new:
            return
        try:
            if sequence.request.params.max_tokens == 0:
                self._finish(sequence, "length")
            else:
                self._emit(sequence, logits)
        except NanLogits as error:
            self._counters["nan_logits"] += 1
            self._fail(sequence, error)
        except Exception as error:
            self._fail(sequence, error)

    def _emit(self, sequence: Sequence, logits: NDArray[np.float32]) -> None:
        params, sampler = sequence.request.params, self._samplers[sequence.id]
        token = sampler.sample(logits, sequence.generated)
        scored = None if params.logprobs is None else logprob(logits, token, params.logprobs)
        self._counters["generation_tokens"] += 1
        if token in sampler.stops:
            self._finish(sequence, "stop")
            return
        sequence.first_token_at = sequence.first_token_at or time.monotonic()
        sequence.tokens.append(token)
        sampler.record(token)
        if sequence.generated >= params.max_tokens:
            self._finish(sequence, "length", token, scored)
        else:
            sequence.sink(self._delta(sequence, token, scored))

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

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        token: int | None = None,
        scored: TokenLogprob | None = None,
        error: str | None = None,
    ) -> None:
        self._sequences.pop(sequence.id, None)
        with self._wake:
            self._drop(sequence, reason)
        sequence.sink(self._delta(sequence, token, scored, reason, error))

    def _drop(self, sequence: Sequence, reason: FinishReason) -> None:
        self._samplers.pop(sequence.id, None)
        self._scheduler.remove(sequence)
        self._finished[reason] += 1

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """End one request; the others never notice."""
        log.error("request %s failed", sequence.id, exc_info=error)
        text = (
            "the model produced NaN"
            if isinstance(error, NanLogits)
            else "an internal error ended this request"
        )
        self._finish(sequence, "error", error=text)
