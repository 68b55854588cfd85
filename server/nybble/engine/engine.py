"""The loop: requests in, deltas out. One thread owns the scheduler and the runner."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque

from nybble.engine.answers import Answers
from nybble.engine.block_pool import BlockPool
from nybble.engine.decoder import Decoder, HostDecoder
from nybble.engine.pipeline import PipelinedDecoder
from nybble.engine.request import Delta, Request, Sink
from nybble.engine.runner import Runner, SamplingRunner
from nybble.engine.sampler import logprob
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
        self._answers = Answers(self._scheduler, self._wake)
        self._counters = self._answers.counters
        self._decoder = self._make_decoder(runner)
        self._heartbeat = time.monotonic()
        self._thread = threading.Thread(target=self._loop, name="nybble-engine", daemon=True)

    def _make_decoder(self, runner: Runner) -> Decoder:
        parts = self._scheduler, self._answers, self._wake
        if isinstance(runner, SamplingRunner):
            return PipelinedDecoder(runner, *parts)
        return HostDecoder(runner, *parts)

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
        scheduler, pool, count, decode = self._scheduler, self._pool, self._counters, self._decoder.meter
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
                requests_finished=dict(self._answers.finished),
                steps=count["steps"],
                step_tokens=count["step_tokens"],
                decode_steps=decode.steps,
                decode_seconds=decode.seconds,
                decode_bytes=decode.bytes,
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
            for sequence in list(self._answers.sequences.values()):
                self._answers.finish(sequence, "abort")
            self._decoder.close()
            with self._wake:
                pending = [s for s in self._inbox if isinstance(s, Sequence)]
                self._inbox.clear()
            for sequence in pending:
                sequence.sink(Delta(time.monotonic(), finish="abort"))

    def step(self) -> None:
        """One turn: take what came in, move every decoding sequence by a token, then prompts by a chunk."""
        self._heartbeat = time.monotonic()
        if self._idle and self._decoder.idle():
            return
        with self._wake:
            if self._idle:
                self._wake.wait(IDLE_SECONDS)
            self._heartbeat = time.monotonic()
            arrived, self._queued = list(self._inbox), 0
            self._inbox.clear()
            for item in arrived:
                self._take(item)
            plan = self._scheduler.plan()
        if plan.tokens:
            self._counters["steps"] += 1
            self._counters["step_tokens"] += plan.tokens
        self._decoder.step(plan.decode)
        for chunk in plan.prefill:
            self._prefill(chunk)

    @property
    def _idle(self) -> bool:
        return not (self._inbox or self._answers.sequences or self._decoder.busy or self._stopping)

    def _take(self, item: Sequence | str) -> None:
        if isinstance(item, str):
            sequence = self._answers.sequences.get(item)
            if sequence is not None:
                self._answers.drop(sequence, "abort")
        elif item.id in self._answers.sequences:
            item.sink(Delta(time.monotonic(), finish="error", error=f"request id {item.id!r} is in use"))
        else:
            self._answers.add(item, self.info.eos_token_ids)

    def _prefill(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        tokens = sequence.tokens[chunk.start : chunk.stop]
        try:
            if sequence.request.params.prompt_logprobs and len(sequence.prompt_logprobs) <= chunk.stop:
                self._score(sequence, tokens, chunk.start)
            else:
                self._runner.prefill(tokens, chunk.start, sequence.blocks)
        except Exception as error:
            self._answers.fail(sequence, error)
            return
        finally:
            self._decoder.interrupted()
        with self._wake:
            self._scheduler.commit(sequence, chunk.stop)
        if not sequence.prefilling and sequence.request.params.max_tokens == 0:
            self._answers.finish(sequence, "length")

    def _score(self, sequence: Sequence, tokens: list[int], start: int) -> None:
        logits = self._runner.score(tokens, start, sequence.blocks)
        scored = sequence.prompt_logprobs = sequence.prompt_logprobs or [None]
        top = sequence.request.params.logprobs or 0
        for row in range(len(scored) - 1 - start, len(tokens)):  # a preempted prompt may have a part already
            scored.append(logprob(logits[row], sequence.tokens[start + row + 1], top))
