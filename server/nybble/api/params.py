"""From the fields of a request to the engine's `SamplingParams`. Limits are checked before it queues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nybble.api.schema import MAX_BIASED, MAX_STOP_CHARS, MAX_STOPS, ChatRequest, CompletionRequest, Sampling
from nybble.config import ServeConfig
from nybble.engine.request import SamplingParams
from nybble.errors import ContextLengthExceeded, InvalidRequest

_PLAIN = (
    *("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("seed", "min_tokens", "ignore_eos"),
)
"""Fields that the engine knows under the same name."""


def stop_strings(value: Any) -> tuple[str, ...]:
    """A string, a list of strings, or nothing; a null inside the list is nothing too."""
    items = [value] if isinstance(value, str) else value if value is not None else []
    if not isinstance(items, list):
        raise InvalidRequest("stop: must be a string or a list of strings.", param="stop")
    if len(items) > MAX_STOPS:
        raise InvalidRequest(
            f"stop: at most {MAX_STOPS} strings are allowed, got {len(items)}.", param="stop"
        )
    stops = tuple(item for item in items if item is not None)
    if not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise InvalidRequest(
            f"stop: each must be a string of 1 to {MAX_STOP_CHARS} characters.", param="stop"
        )
    return stops


def token_ids(value: Any, vocab_size: int, param: str, at_most: int) -> tuple[int, ...]:
    """A list of ids inside the vocabulary; booleans are no integers here."""
    if not isinstance(value, list):
        raise InvalidRequest(f"{param}: must be a list of token ids.", param=param)
    if len(value) > at_most:
        raise InvalidRequest(f"{param}: at most {at_most} ids are allowed, got {len(value)}.", param=param)
    if not all(type(item) is int and 0 <= item < vocab_size for item in value):
        raise InvalidRequest(f"{param}: token ids must be integers from 0 to {vocab_size - 1}.", param=param)
    return tuple(value)


def logit_bias(value: Any, vocab_size: int) -> dict[int, float]:
    """JSON keys are strings, so ids come as decimal strings."""
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_BIASED:
        raise InvalidRequest(
            f"logit_bias: must be an object with at most {MAX_BIASED} entries.", param="logit_bias"
        )
    return {_biased_id(key, vocab_size): _bias(bias) for key, bias in value.items()}


def _biased_id(key: str, vocab_size: int) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 12 and int(key) < vocab_size):
        raise InvalidRequest(
            f"logit_bias: keys must be token ids from 0 to {vocab_size - 1}.", param="logit_bias"
        )
    return int(key)


def _bias(value: Any) -> float:
    if type(value) not in (int, float) or not -100 <= value <= 100:
        raise InvalidRequest("logit_bias: values must be numbers from -100 to 100.", param="logit_bias")
    return float(value)


def choices(body: Sampling, config: ServeConfig) -> int:
    n = body.n if body.n is not None else 1
    if n > config.max_n:
        raise InvalidRequest(f"n: at most {config.max_n} choices are allowed, got {n}.", param="n")
    return n


def sampling(body: Sampling, config: ServeConfig, vocab_size: int) -> SamplingParams:
    """All but `max_tokens`, which needs the length of the prompt (`fit`)."""
    options: dict[str, Any] = {
        name: getattr(body, name) for name in _PLAIN if getattr(body, name) is not None
    }
    return SamplingParams(
        **options,
        top_k=min(max(body.top_k or 0, 0), vocab_size),
        logit_bias=logit_bias(body.logit_bias, vocab_size),
        stop_token_ids=frozenset(token_ids(body.stop_token_ids or [], vocab_size, "stop_token_ids", 256)),
        logprobs=_logprobs(body, config),
        prompt_logprobs=isinstance(body, CompletionRequest) and _scores_prompt(body),
    )


def _logprobs(body: Sampling, config: ServeConfig) -> int | None:
    if isinstance(body, ChatRequest):
        name, wanted = "top_logprobs", body.top_logprobs
        if wanted and not body.logprobs:
            raise InvalidRequest("top_logprobs: needs logprobs to be true.", param=name)
        count = wanted or 0 if body.logprobs else None
    else:
        assert isinstance(body, CompletionRequest)
        name, count = "logprobs", body.logprobs
        if count is None and _scores_prompt(body):
            count = 0
    if count is not None and count > config.max_logprobs:
        raise InvalidRequest(f"{name}: at most {config.max_logprobs} are allowed, got {count}.", param=name)
    return count


def _scores_prompt(body: CompletionRequest) -> bool:
    """Whether the prompt's own probabilities are computed: to be shown, or as there is nothing else to do."""
    return bool(body.echo) and (body.logprobs is not None or body.max_tokens == 0)


def fit(
    params: SamplingParams, prompt: Sequence[int], asked: int | None, limit: int, param: str
) -> SamplingParams:
    """Set `max_tokens`; raises when prompt and answer together do not fit the context."""
    room = limit - len(prompt)
    wanted = asked if asked is not None else max(room, 1)
    if wanted > room:
        raise ContextLengthExceeded.of(limit, len(prompt), wanted, param)
    if params.min_tokens > wanted:
        raise InvalidRequest(
            f"min_tokens: must be at most max_tokens, which is {wanted}.", param="min_tokens"
        )
    return replace(params, max_tokens=wanted)
