"""What a round of requests says: quantiles of latency, and tokens a second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nybble.bench.load import Round


@dataclass(frozen=True, slots=True)
class Summary:
    """Times in milliseconds, rates in tokens a second. `stream_rate`: one stream after its first token."""

    concurrency: int
    requests: int
    failed: int
    prompt_tokens: float
    tokens: int
    wall_seconds: float
    first_token_ms: dict[str, float]
    inter_token_ms: dict[str, float]
    stream_rate: float
    total_rate: float
    requests_per_second: float


def summarize(done: Round) -> Summary:
    """Needs at least one answered request."""
    tokens = sum(sample.tokens for sample in done.samples)
    rates = [sample.rate for sample in done.samples if sample.rate is not None]
    return Summary(
        concurrency=done.concurrency,
        requests=len(done.samples),
        failed=len(done.failures),
        prompt_tokens=sum(sample.prompt_tokens for sample in done.samples) / len(done.samples),
        tokens=tokens,
        wall_seconds=done.wall,
        first_token_ms=_spread([sample.first for sample in done.samples]),
        inter_token_ms=_spread([gap for sample in done.samples for gap in sample.gaps]),
        stream_rate=quantile(rates, 0.5),
        total_rate=tokens / done.wall,
        requests_per_second=len(done.samples) / done.wall,
    )


def quantile(values: Sequence[float], q: float) -> float:
    """Linear between the two nearest ranks; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {name: 1000 * quantile(seconds, q) for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}
