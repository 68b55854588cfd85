"""A request while the engine holds it: its tokens, how far they are computed, and the blocks they fill."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from nybble.engine.block_pool import BlockHash
from nybble.engine.request import Request, RequestTimes, Sink, TokenLogprob


@dataclass(slots=True, eq=False)
class Sequence:
    """Positions `[0, computed)` have keys and values; the prefill computes `[0, prefill_end)`.

    With a device that samples, "have" means: will have, before anything launched from now on. Of the tokens
    made by then the host has not read `in_flight` yet: none or one, and two for the moment between the launch
    of a step and the reading of the one before. `computed <= len(tokens) + in_flight`.

    The last prompt token and every generated one go through the decode step, which makes the logits. So the
    numbers behind a position depend on its own sequence only: after a preemption the prompt is prefilled
    again and the generated tokens are replayed by the step that made them.
    """

    request: Request
    sink: Sink
    tokens: list[int]
    hashes: list[BlockHash] = field(default_factory=list)  # of the full blocks within `[0, prefill_end)`
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    published: int = 0  # leading blocks made findable
    slot: int = -1  # of the sampling state on the device, while it runs
    opened: bool = False  # whether the slot holds its state
    in_flight: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    answered: bool = False  # whether a delta went out
    queued_at: float = field(default_factory=time.monotonic)
    started_at: float = 0.0
    first_token_at: float = 0.0

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def prefill_end(self) -> int:
        return self.prompt_length - 1

    @property
    def prefilling(self) -> bool:
        return self.computed < self.prefill_end

    @property
    def at_last_token(self) -> bool:
        """Whether the next decode step makes a new token (else it replays one)."""
        return self.computed == len(self.tokens) + self.in_flight - 1

    @property
    def complete(self) -> bool:
        """Whether the last token it may make is in flight: nothing is left to launch."""
        return self.in_flight > 0 and self.generated + self.in_flight >= self.request.params.max_tokens

    def times(self, now: float) -> RequestTimes:
        started = self.started_at or now
        first = self.first_token_at or now
        return RequestTimes(
            queue=started - self.queued_at,
            prefill=first - started,
            decode=now - first,
            cached_tokens=self.cached_tokens,
            preemptions=self.preemptions,
        )
