"""Logits to tokens, one sequence at a time: a request's result depends on its own numbers only."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.engine.request import SamplingParams, TokenLogprob

Logits = NDArray[np.float32]  # [V]

CANDIDATES = 1024  # most likely tokens looked at first; top-p needs more only for nearly flat distributions


class NanLogits(Exception):
    """The model produced NaN: no token can be drawn."""


class Sampler:
    """The sampling state of one sequence.

    Order of operations, as in the OpenAI API and its common extensions: logit bias, repetition, frequency and
    presence penalties; then temperature, top-k, top-p, min-p; then one draw. Log probabilities are those of
    the model, before any of it. Draws come from Philox(seed, position): equal seeds give equal text, whatever
    runs beside it.
    """

    def __init__(self, params: SamplingParams, prompt: tuple[int, ...], eos: tuple[int, ...]) -> None:
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else params.seed & (2**64 - 1)
        self.stops = params.stop_token_ids | (frozenset() if params.ignore_eos else frozenset(eos))
        self._bias_ids = np.array(list(params.logit_bias), dtype=np.int64)
        self._bias = np.array(list(params.logit_bias.values()), dtype=np.float32)
        self._muted = np.array(sorted(self.stops), dtype=np.int64)
        penalised = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
        self._counts = TokenCounts(prompt) if penalised else None

    def sample(self, logits: Logits, generated: int) -> int:
        """Draw token number `generated` (0 is the first). `logits` is not changed."""
        params = self.params
        likeliest = int(logits.argmax())  # a NaN, where there is one
        if not np.isfinite(logits[likeliest]):
            raise NanLogits
        adjusted = self._adjust(logits, generated)
        if params.temperature == 0.0:
            return likeliest if adjusted is logits else int(adjusted.argmax())
        return self._draw(adjusted, generated)

    def record(self, token: int) -> None:
        """Count a token that was generated."""
        if self._counts is not None:
            self._counts.add(token)

    def _adjust(self, logits: Logits, generated: int) -> Logits:
        params = self.params
        muted = generated < params.min_tokens and self._muted.size > 0
        if not (muted or self._bias_ids.size or self._counts is not None):
            return logits
        logits = logits.copy()
        logits[self._bias_ids] += self._bias
        if self._counts is not None:
            self._counts.penalise(logits, params)
        if muted:
            logits[self._muted] = -np.inf
        return logits

    def _draw(self, logits: Logits, generated: int) -> int:
        params = self.params
        scaled = (logits.astype(np.float64) - logits.max()) / max(params.temperature, 1e-5)
        weights = np.exp(scaled)
        ids, kept = self._candidates(weights)
        if params.min_p > 0.0:
            enough = kept >= params.min_p * kept[0]
            ids, kept = ids[enough], kept[enough]
        cumulative = kept.cumsum()
        key = np.array([self.seed, generated], dtype=np.uint64)  # a list goes through float64 from 2^63 on
        uniform = np.random.Generator(np.random.Philox(key=key)).random()
        chosen = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
        return int(ids[min(chosen, len(ids) - 1)])

    def _candidates(self, weights: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Token ids and weights that top-k and top-p leave, most likely first."""
        params, total = self.params, float(weights.sum())
        top_k = params.top_k if 0 < params.top_k < weights.size else weights.size
        if top_k == weights.size and params.top_p >= 1.0 and params.min_p <= 0.0:
            order = np.arange(weights.size)
            return order, weights
        count = min(CANDIDATES, weights.size)
        while True:
            ids = largest(weights, count)
            kept = weights[ids]
            if count >= top_k or kept.sum() >= params.top_p * total or count == weights.size:
                break
            count = weights.size
        ids, kept = ids[:top_k], kept[:top_k]
        if params.top_p < 1.0:
            base = total if top_k == weights.size else kept.sum()
            last = int(np.searchsorted(kept.cumsum(), params.top_p * base, side="left"))
            ids, kept = ids[: last + 1], kept[: last + 1]
        return ids, kept


class TokenCounts:
    """Tokens seen so far, in growing arrays: a step costs the distinct tokens, not the whole history."""

    def __init__(self, prompt: tuple[int, ...]) -> None:
        self._slot: dict[int, int] = {}
        self._ids = np.zeros(64, dtype=np.int64)
        self._generated = np.zeros(64, dtype=np.float32)
        for token in prompt:
            self._find(token)

    def _find(self, token: int) -> int:
        slot = self._slot.setdefault(token, len(self._slot))
        if slot >= len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._generated = np.concatenate([self._generated, np.zeros_like(self._generated)])
        self._ids[slot] = token
        return slot

    def add(self, token: int) -> None:
        slot = self._find(token)  # before the array is looked at: it may be replaced by a longer one
        self._generated[slot] += 1

    def penalise(self, logits: Logits, params: SamplingParams) -> None:
        """Repetition divides or multiplies every seen token; the other two subtract for generated ones."""
        ids = self._ids[: len(self._slot)]
        counts = self._generated[: len(self._slot)]
        seen = logits[ids]
        seen = np.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
        logits[ids] = seen - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)


def largest(values: NDArray[np.floating[Any]], count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest values, largest first, lowest index first among equals."""
    if count < values.size:
        chosen = np.sort(np.argpartition(values, values.size - count)[values.size - count :])
    else:
        chosen = np.arange(values.size)
    return chosen[np.argsort(-values[chosen], kind="stable")]


def logprob(logits: Logits, token: int, top: int) -> TokenLogprob:
    """Log-softmax of the model's logits at `token`, and the `top` most likely alternatives."""
    highest = logits.max()
    normaliser = float(highest) + float(np.log(np.exp(logits - highest).sum(dtype=np.float64)))
    best = largest(logits, top) if top else np.zeros(0, dtype=np.int64)
    alternatives = tuple((int(i), float(logits[i]) - normaliser) for i in best)
    return TokenLogprob(token, float(logits[token]) - normaliser, alternatives)
