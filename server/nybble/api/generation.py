"""One HTTP request in the engine: submit its sequences, hand out their pieces, free them whatever happens."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

from nybble.api.choice import Choice, Piece
from nybble.api.clock import Clock
from nybble.api.inbox import Inbox
from nybble.api.lifecycle import Loaded
from nybble.api.prompts import Prompt
from nybble.api.service import Service
from nybble.engine.request import FinishReason, Request, SamplingParams
from nybble.errors import NybbleError, RequestFailed


@dataclass(frozen=True, slots=True)
class Plan:
    """A validated request: every prompt is continued `n` times."""

    id: str
    model: str
    prompts: Sequence[Prompt]
    params: Sequence[SamplingParams]  # one per prompt
    n: int = 1
    stops: Sequence[str] = ()
    echo: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    prompt: int
    completion: int
    cached: int

    def fields(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Generation:
    """`with Generation(...) as g: async for pieces in g.batches(): ...`; leaving aborts what still runs."""

    def __init__(self, service: Service, loaded: Loaded, plan: Plan, arrived: float) -> None:
        self.plan = plan
        self.loaded = loaded
        self.created = int(time.time())
        self._lifecycle = service.lifecycle
        self._inbox = Inbox(service.config.keep_alive)
        self.choices = [
            Choice(i * plan.n + j, prompt, params, loaded.tokenizer, plan.stops, plan.echo)
            for i, (prompt, params) in enumerate(zip(plan.prompts, plan.params, strict=True))
            for j in range(plan.n)
        ]
        self._clocks = [Clock(service.metrics, arrived, len(choice.prompt.ids)) for choice in self.choices]
        self._open: set[int] = set()
        self._cached = [0] * len(self.choices)

    def __enter__(self) -> Self:
        """Raises `QueueFull` and the like; then nothing stays behind."""
        self._lifecycle.live.add(self)
        try:
            for choice in self.choices:
                self._submit(choice)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def batches(self) -> AsyncIterator[list[tuple[Choice, Piece]]]:
        """Ends when every choice has finished; an empty batch means that nothing came for a while."""
        while self._open:
            taken = await self._inbox.take()
            pieces: list[tuple[Choice, Piece]] = []
            for index, delta in taken:
                if index not in self._open:
                    continue
                choice, clock = self.choices[index], self._clocks[index]
                clock.see(delta)
                self._cached[index] = max(self._cached[index], delta.cached_tokens)
                try:
                    piece = choice.feed(delta)
                except RequestFailed:
                    self._end(choice, "error")
                    raise
                if choice.finish is not None:
                    self._end(choice, choice.finish)
                if piece is not None:
                    pieces.append((choice, piece))
            if pieces or not taken:
                yield pieces

    def usage(self) -> Usage:
        """A prompt counts once, however many choices continue it."""
        n = self.plan.n
        return Usage(
            sum(len(prompt.ids) for prompt in self.plan.prompts),
            sum(choice.tokens for choice in self.choices),
            sum(max(self._cached[i : i + n]) for i in range(0, len(self.choices), n)),
        )

    def usage_of(self, choice: Choice, piece: Piece) -> Usage:
        """Of one choice, as far as this piece."""
        return Usage(len(choice.prompt.ids), piece.tokens, self._cached[choice.index])

    def fail(self, error: NybbleError) -> None:
        self._inbox.fail(error)

    def close(self) -> None:
        """Idempotent. Frees what the engine still holds for this request."""
        self._lifecycle.live.discard(self)
        self._inbox.close()
        for index in list(self._open):
            self._end(self.choices[index], "abort")

    def _submit(self, choice: Choice) -> None:
        index = choice.index
        params = self.plan.params[index // self.plan.n]
        if params.seed is not None and (turn := index % self.plan.n):
            params = replace(params, seed=(params.seed + turn + 2**63) % 2**64 - 2**63)
        request = Request(self._id(index), choice.prompt.ids, params)
        self.loaded.engine.submit(request, self._inbox.sink(index))
        self._open.add(index)

    def _end(self, choice: Choice, reason: FinishReason) -> None:
        """A stop string ends a sequence that the engine would go on with; finished ids are ignored there."""
        self._open.discard(choice.index)
        self.loaded.engine.abort(self._id(choice.index))
        self._clocks[choice.index].end(choice.tokens, reason)

    def _id(self, index: int) -> str:
        return f"{self.plan.id}-{index}"
