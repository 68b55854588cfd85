"""Sampling by sorting, in float64: a row's distribution, and what the rounds of the kernel draw from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble_kernels.triton.sample_state import Settings

Array = NDArray[Any]


def adjusted(
    logits: Array,
    settings: Settings,
    *,
    prompt: Sequence[int] = (),
    generated: Sequence[int] = (),
    stops: Sequence[int] = (),
    bias: Mapping[int, float] | None = None,
) -> Array:
    """Float32 logits [V] after bias, penalties and muting, in the order that `triton.sample` states."""
    x = logits.astype(np.float32).copy()
    for token, value in (bias or {}).items():
        x[token] += np.float32(value)
    times = np.bincount(np.array(generated, dtype=np.int64), minlength=len(x)).astype(np.float32)
    seen = np.unique(np.array([*prompt, *generated], dtype=np.int64))
    repetition = np.float32(settings.repetition_penalty)
    scaled = np.where(x[seen] > 0, x[seen] / repetition, x[seen] * repetition)
    scaled = scaled - np.float32(settings.frequency_penalty) * times[seen]
    x[seen] = scaled - np.float32(settings.presence_penalty) * (times[seen] > 0)
    if len(generated) < settings.min_tokens:
        x[list(stops)] = -np.inf
    return x


def ranked(x: Array, settings: Settings) -> tuple[Array, Array]:
    """Ids from the largest logit down, lowest first among equals, and their float64 weights."""
    order = np.argsort(-x, kind="stable")
    return order, np.exp((x.astype(np.float64) - float(x.max())) / max(settings.temperature, 1e-5))[order]


def kept(x: Array, settings: Settings) -> int:
    """How many of the likeliest tokens top-k, then top-p, then min-p leave."""
    _, weights = ranked(x, settings)
    count = len(weights)
    if 0 < settings.top_k < count:
        count = settings.top_k
    if settings.top_p < 1.0:
        before = np.concatenate([[0.0], weights[:count].cumsum()])
        count = max(1, int((before[:-1] < settings.top_p * before[-1]).sum()))
    if settings.min_p > 0.0:
        count = min(count, int((weights >= settings.min_p).sum()))
    return count


def distribution(x: Array, settings: Settings) -> Array:
    """Probabilities float64 [V] of the adjusted logits x."""
    probabilities = np.zeros(len(x))
    if settings.temperature == 0.0:
        probabilities[x.argmax()] = 1.0
        return probabilities
    order, weights = ranked(x, settings)
    count = kept(x, settings)
    probabilities[order[:count]] = weights[:count] / weights[:count].sum()
    return probabilities


def draw(x: Array, settings: Settings, generated: int, block: int) -> int:
    """The token that the kernel's rounds give: from all before a limit, until one is kept.

    A round draws a tile of `block` tokens by its mass, then a token in it, each by a uniform of its own.
    """
    if settings.temperature == 0.0:
        return int(x.argmax())
    order, weights = ranked(x, settings)
    count = kept(x, settings)
    limit, turn = len(order), 0
    if settings.min_p > 0.0:
        limit = int((weights >= settings.min_p).sum())
    filtered = 0 < settings.top_k < len(order) or settings.top_p < 1.0
    while True:
        mass = np.zeros(-(-len(x) // block) * block)
        mass[order[:limit]] = weights[:limit]
        first, second = uniforms(settings.seed, generated, turn)
        tile = pick(mass.reshape(-1, block).sum(1), first)
        token = tile * block + pick(mass.reshape(-1, block)[tile], second)
        rank = int(np.flatnonzero(order == token)[0])
        if not filtered or rank < count:
            return token
        limit, turn = rank, turn + 1


def pick(weights: Array, uniform: float) -> int:
    """Inverse transform."""
    running = weights.cumsum()
    return int(np.searchsorted(running, uniform * running[-1], side="right"))


def uniforms(seed: int, generated: int, turn: int) -> tuple[float, float]:
    """The first two words of Philox(seed; generated, turn, 0, 0) as numbers of 24 bits in [0, 1)."""
    words = philox((generated, turn, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
    return (words[0] >> 8) * 2.0**-24, (words[1] >> 8) * 2.0**-24


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right >> 32) ^ b ^ low, right & 0xFFFFFFFF, (left >> 32) ^ d ^ high, left & 0xFFFFFFFF
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return a, b, c, d
