"""Every sampling parameter, on logits small enough to work out by hand."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from nybble.engine.request import SamplingParams
from nybble.engine.sampler import NanLogits, Sampler, largest, logprob

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03], dtype=np.float32))


def sampler(prompt: tuple[int, ...] = (0,), **params: Any) -> Sampler:
    return Sampler(SamplingParams(**params), prompt, eos=(4,))


def drawn(count: int = 4000, **params: Any) -> Counter[int]:
    sampling = sampler(seed=1, **params)
    return Counter(sampling.sample(LOGITS, i) for i in range(count))


def test_temperature_zero_takes_the_most_likely() -> None:
    assert sampler(temperature=0.0).sample(LOGITS, 0) == 0


def test_draws_follow_the_probabilities() -> None:
    counts = drawn()
    for token, probability in enumerate([0.5, 0.25, 0.15, 0.07, 0.03]):
        sigma = math.sqrt(4000 * probability * (1 - probability))
        assert abs(counts[token] - 4000 * probability) < 5 * sigma


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.74}, {0, 1}),
        ({"top_p": 0.76}, {0, 1, 2}),
        ({"top_p": 1e-9}, {0}),
        ({"min_p": 0.29}, {0, 1, 2}),
        ({"top_k": 3, "top_p": 0.8}, {0, 1}),  # of the three kept, 0.5 + 0.25 is 83 %
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
    ],
    ids=str,
)
def test_filters_keep_just_the_likely(params: dict[str, Any], kept: set[int]) -> None:
    assert set(drawn(2000, **params)) == kept


def test_filters_agree_with_a_full_sort_on_a_large_flat_vocabulary() -> None:
    logits = np.random.default_rng(0).normal(size=5000).astype(np.float32) * 0.1
    weights = np.exp(logits.astype(np.float64))
    order = np.argsort(-weights, kind="stable")
    needed = int(np.searchsorted(weights[order].cumsum(), 0.6 * weights.sum())) + 1
    sampling = sampler(top_p=0.6, seed=3)
    ids, _ = sampling._candidates(weights)
    assert needed > 1024
    assert ids.tolist() == order[:needed].tolist()


def test_a_seed_and_a_position_decide_the_draw() -> None:
    one = [sampler(seed=5).sample(LOGITS, i) for i in range(50)]
    assert one == [sampler(seed=5).sample(LOGITS, i) for i in range(50)]
    assert one != [sampler(seed=6).sample(LOGITS, i) for i in range(50)]
    assert len(set(one)) > 1


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 - 1])
def test_every_bit_of_a_seed_counts(seed: int) -> None:
    draws = [[sampler(seed=s).sample(LOGITS, i) for i in range(50)] for s in (seed, seed ^ 1)]
    assert draws[0] != draws[1]


def test_temperature_flattens_and_sharpens() -> None:
    assert drawn(2000, temperature=3.0)[4] > drawn(2000)[4] > drawn(2000, temperature=0.3)[4]


def test_logit_bias_can_force_and_forbid() -> None:
    assert sampler(temperature=0.0, logit_bias={3: 100.0}).sample(LOGITS, 0) == 3
    assert sampler(temperature=0.0, logit_bias={0: -100.0}).sample(LOGITS, 0) == 1


@pytest.mark.parametrize(
    ("params", "prompt", "expected"),
    [
        ({"presence_penalty": 2.0}, (2,), 1),
        ({"frequency_penalty": 1.0}, (2,), 1),
        ({"presence_penalty": 2.0}, (0,), 1),
        ({"repetition_penalty": 3.0}, (2,), 1),
    ],
    ids=["presence", "frequency", "presence-ignores-prompt", "repetition"],
)
def test_penalties_lower_what_was_generated(
    params: dict[str, float], prompt: tuple[int, ...], expected: int
) -> None:
    sampling = sampler(prompt, temperature=0.0, **params)
    assert sampling.sample(LOGITS, 0) == 0
    sampling.record(0)
    assert sampling.sample(LOGITS, 1) == expected


def test_repetition_penalty_counts_the_prompt() -> None:
    assert sampler((0,), temperature=0.0, repetition_penalty=3.0).sample(LOGITS, 0) == 1


def test_frequency_penalty_grows_with_each_use() -> None:
    sampling = sampler(temperature=0.0, frequency_penalty=0.4)
    chosen = []
    for i in range(4):
        chosen.append(sampling.sample(LOGITS, i))
        sampling.record(chosen[-1])
    assert chosen == [0, 0, 1, 0]


def test_penalties_cope_with_many_distinct_tokens() -> None:
    logits = np.zeros(1000, dtype=np.float32)
    sampling = Sampler(SamplingParams(temperature=0.0, presence_penalty=1.0), (), eos=())
    for expected in range(200):
        assert sampling.sample(logits, expected) == expected
        sampling.record(expected)


def test_min_tokens_mutes_the_end() -> None:
    ending = np.array([0, 0, 0, 0, 9], dtype=np.float32)
    sampling = sampler(temperature=0.0, min_tokens=2)
    assert [sampling.sample(ending, i) == 4 for i in range(3)] == [False, False, True]


def test_the_logits_are_left_alone() -> None:
    before = LOGITS.copy()
    sampler(logit_bias={1: 5.0}, repetition_penalty=2.0, temperature=0.7, top_p=0.5).sample(LOGITS, 0)
    assert np.array_equal(before, LOGITS)


def test_nan_is_refused() -> None:
    with pytest.raises(NanLogits):
        sampler().sample(np.array([0.0, np.nan, 1.0], dtype=np.float32), 0)


def test_logprob_is_a_log_softmax() -> None:
    scored = logprob(LOGITS * 1.0 + 7, 2, 3)
    assert scored.logprob == pytest.approx(math.log(0.15), abs=1e-5)
    assert [token for token, _ in scored.top] == [0, 1, 2]
    assert dict(scored.top)[2] == scored.logprob, "the chosen token must carry the very same number"
    assert logprob(LOGITS, 2, 0).top == ()


def test_largest_prefers_the_lower_index_among_equals() -> None:
    assert largest(np.array([1.0, 3.0, 3.0, 0.0]), 2).tolist() == [1, 2]
