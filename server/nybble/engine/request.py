"""The records that cross between the HTTP layer and the engine. Plain Python: no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. Ranges are checked by the caller; `top_k=0` and `logprobs=None` mean off.

    `logprobs=k` asks for the chosen token's log probability and the k most likely alternatives.
    `prompt_logprobs` asks for the same at every prompt position (the first has none).
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    prompt_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to continue. `max_tokens=0` is allowed with `prompt_logprobs` (scoring only).

    `cache_salt` keeps tenants apart in the prefix cache: blocks are shared only under an equal salt.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of `token`, and the alternatives, most likely first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Seconds a finished request spent in each phase, and what the prefix cache saved it."""

    queue: float
    prefill: float
    decode: float
    cached_tokens: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step made of one request.

    A delta carries a token, or a finish, or both (the token that ended it by length or as a stop token:
    a stop token itself is reported with `token=None`). `at` is `time.monotonic()` in the engine.
    `prompt_logprobs` comes once, in the first delta, one entry per prompt token, the first `None`.
    `cached_tokens` is set in the first delta. `error` explains `finish == "error"`.
    """

    at: float
    token: int | None = None
    logprob: TokenLogprob | None = None
    finish: FinishReason | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    cached_tokens: int = 0
    times: RequestTimes | None = None
    error: str | None = None


Sink = Callable[[Delta], None]
"""Called from the engine's thread; it must not block and must not raise."""
