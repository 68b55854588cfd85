"""The sampling kernel against sampling by sorting, token by token and as a distribution."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from nybble.engine.request import SamplingParams
from nybble.engine.sampler import Sampler
from nybble_kernels import sample_reference as reference
from nybble_kernels.triton.sample import sample
from nybble_kernels.triton.sample_state import BLOCK, PROMPT, STOP, SampleState, Settings, marks

UNTOUCHED = -77
PLACES, PLACE = 3, 1
DRAWS = 16 if os.environ.get("TRITON_INTERPRET") == "1" else 4096  # the interpreter takes long for each


class Bench:
    """A state whose workspace and unused slots hold rubbish, and logits in rows that are not adjacent."""

    def __init__(self, device: torch.device, vocabulary: int, *, slots: int = 8, block: int = 64) -> None:
        self.device, self.vocabulary, self.block = device, vocabulary, block
        self.state = SampleState(slots, vocabulary, slots, device, block=block)
        self.state.partials.fill_(float("nan"))
        self.state.best.fill_(2**30)
        self.state.bias.fill_(float("nan"))
        self.state.counts.fill_(2**29 - 1)

    def open(self, slot: int, settings: Settings, **given: Any) -> None:
        self.state.open(slot, settings, **given)

    def __call__(self, logits: np.ndarray, slots: list[int]) -> list[int]:
        """Tokens of the rows; whatever else there is to write on stays as it was."""
        rows, width = logits.shape
        wide = torch.full((rows, width + 5), float("inf"), device=self.device)
        wide[:, :width] = torch.from_numpy(logits)
        out = torch.full((PLACES, rows + 2), UNTOUCHED, dtype=torch.int32, device=self.device)
        place = torch.tensor([PLACE], dtype=torch.int32, device=self.device)
        sample(
            wide[:, :width],
            torch.tensor(slots, dtype=torch.int32, device=self.device),
            self.state,
            out,
            place,
        )
        assert torch.equal(wide[:, :width].cpu(), torch.from_numpy(logits)) or np.isnan(logits).any()
        assert self.state.counters.eq(0).all()
        assert out[PLACE, rows:].eq(UNTOUCHED).all() and out[[0, 2]].eq(UNTOUCHED).all()
        drawn: list[int] = out[PLACE, :rows].tolist()
        return drawn


def rows(count: int, vocabulary: int, seed: int = 0, spread: float = 2.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(count, vocabulary)) * spread).astype(np.float32)


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65, 300])
def test_greedy_takes_the_lowest_id_among_equals(device: torch.device, vocabulary: int) -> None:
    bench = Bench(device, vocabulary)
    logits = rows(4, vocabulary)
    logits[1, [vocabulary // 3, vocabulary // 2, vocabulary - 1]] = 50.0  # within a tile, and across tiles
    logits[2, vocabulary - 1] = 50.0
    logits[3] = 1.0
    for slot in range(4):
        bench.open(slot, Settings(temperature=0.0))
    expected = [int(logits[0].argmax()), vocabulary // 3, vocabulary - 1, 0]
    assert bench(logits, [0, 1, 2, 3]) == expected
    assert bench.state.tokens[:4].tolist() == expected


@pytest.mark.parametrize("vocabulary", [1000, 50257])
def test_real_vocabularies_in_real_tiles(device: torch.device, vocabulary: int) -> None:
    bench = Bench(device, vocabulary, block=BLOCK)
    logits = rows(2, vocabulary)
    settings = Settings(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, seed=5)
    bench.open(0, Settings(temperature=0.0))
    bench.open(1, settings)
    assert bench(logits, [0, 1]) == [int(logits[0].argmax()), reference.draw(logits[1], settings, 0, BLOCK)]


SETTINGS = {
    "plain": Settings(),
    "cold": Settings(temperature=0.05),
    "hot": Settings(temperature=30.0),
    "nearly-greedy": Settings(temperature=1e-9),
    "top-k": Settings(top_k=7),
    "top-k-one": Settings(top_k=1),
    "top-k-all": Settings(top_k=1000, top_p=0.9),
    "top-p": Settings(top_p=0.6),
    "top-p-tiny": Settings(top_p=1e-9),
    "top-p-zero": Settings(top_p=0.0),
    "top-p-nearly-all": Settings(temperature=3.0, top_p=0.999),
    "min-p": Settings(min_p=0.1),
    "min-p-one": Settings(min_p=1.0),
    "top-k-top-p": Settings(temperature=1.5, top_k=20, top_p=0.7),
    "top-k-top-p-flat": Settings(temperature=50.0, top_k=200, top_p=0.5),
    "all": Settings(temperature=2.0, top_k=50, top_p=0.9, min_p=0.02),
}


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("name", SETTINGS)
def test_draws_are_those_of_the_reference(device: torch.device, name: str, ties: bool) -> None:
    """With ties, about forty values for 300 tokens: every cut goes through equal logits."""
    vocabulary, count = 300, 3
    bench = Bench(device, vocabulary)
    logits = rows(count, vocabulary, seed=len(name))
    if ties:
        logits = np.round(logits * 4) / 4
    logits[1, ::3] = -np.inf
    many = [replace(SETTINGS[name], seed=2**63 + 7 * slot) for slot in range(count)]
    for slot, settings in enumerate(many):
        bench.open(slot, settings, generated=[0] * slot)
    expected = [reference.draw(logits[i], many[i], i, bench.block) for i in range(count)]
    assert bench(logits, list(range(count))) == expected


SMALL = np.array([2.0, 1.5, 1.5, 1.0, 1.0, 1.0, 0.0, -1.0, -1.0, -5.0, -np.inf], dtype=np.float32)
DISTRIBUTIONS = ["plain", "top-k", "top-p", "min-p", "all"]


def assert_follows(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Pearson's chi-square over what is likely enough to count, at five sigma; nothing of probability 0."""
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * counts.sum()
    likely = expected >= 2
    degrees = likely.sum()
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert statistic <= degrees + 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_rounds_draw_from_the_truncated_distribution(name: str) -> None:
    settings = replace(SETTINGS[name], top_k=min(SETTINGS[name].top_k, 5))
    drawn = [reference.draw(SMALL, replace(settings, seed=seed), 3, 4) for seed in range(4000)]
    assert_follows(np.bincount(drawn, minlength=len(SMALL)), reference.distribution(SMALL, settings))


@pytest.mark.parametrize("name", ["plain", "all"])
def test_the_kernel_draws_from_the_truncated_distribution(device: torch.device, name: str) -> None:
    settings = replace(SETTINGS[name], top_k=min(SETTINGS[name].top_k, 5))
    bench = Bench(device, len(SMALL), slots=DRAWS, block=4)
    for slot in range(DRAWS):
        bench.open(slot, replace(settings, seed=slot))
    drawn = bench(np.tile(SMALL, (DRAWS, 1)), list(range(DRAWS)))
    assert_follows(np.bincount(drawn, minlength=len(SMALL)), reference.distribution(SMALL, settings))


PENALTIES = {
    "bias": {"bias": {0: 3.0, 64: -2.0, 299: 9.0}},
    "repetition": {"repetition_penalty": 1.7},
    "reward": {"repetition_penalty": 0.6},
    "frequency": {"frequency_penalty": 0.9},
    "presence": {"presence_penalty": 1.5},
    "everything": {
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.4,
        "presence_penalty": -0.3,
        "min_tokens": 30,
        "bias": {5: 2.0, 7: 2.0},
    },
}


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_are_those_of_the_reference(device: torch.device, name: str, temperature: float) -> None:
    """Step by step: the kernel counts its own tokens. Logits close together, so that small changes show."""
    given = dict(PENALTIES[name])
    bias = given.pop("bias", None)
    settings = Settings(temperature=temperature, seed=9, **given)  # type: ignore[arg-type]
    prompt, generated, stops = [3, 3, 80, 299], [4, 80, 80], [1, 200]
    bench = Bench(device, 300)
    bench.open(2, settings, prompt=prompt, generated=generated, stops=stops, bias=bias)  # type: ignore[arg-type]
    for turn in range(5):
        logits = rows(1, 300, seed=turn, spread=0.3)
        logits[0, [1, 3, 4, 80, 299]] += 1.5
        x = reference.adjusted(
            logits[0],
            settings,
            prompt=prompt,
            generated=generated,
            stops=stops,
            bias=bias,  # type: ignore[arg-type]
        )
        (token,) = bench(logits, [2])
        assert token == reference.draw(x, settings, len(generated), bench.block)
        generated.append(token)
    if settings.counts:
        ids, values = marks(prompt, generated, stops)
        assert bench.state.counts[2].cpu().numpy().nonzero()[0].tolist() == ids.tolist()
        assert bench.state.counts[2].cpu().numpy()[ids].tolist() == values.tolist()


def test_marks_hold_counts_and_kinds() -> None:
    ids, values = marks([5, 2, 5], [2, 2, 9], [9, 7])
    assert dict(zip(ids.tolist(), values.tolist(), strict=True)) == {
        5: PROMPT, 2: PROMPT | 2, 9: STOP | 1, 7: STOP
    }  # fmt: skip


def test_stop_tokens_are_muted_until_min_tokens(device: torch.device) -> None:
    bench = Bench(device, 100)
    logits = rows(1, 100)
    logits[0, [7, 70]] = [50.0, 60.0]
    rest = logits[0].copy()
    rest[[7, 70]] = -np.inf
    bench.open(0, Settings(temperature=0.0, min_tokens=3), generated=[1], stops=[70, 7])
    assert [bench(logits, [0])[0] for _ in range(3)] == [int(rest.argmax()), int(rest.argmax()), 70]


def test_a_slot_opened_again_goes_on_where_it_was(device: torch.device) -> None:
    settings = Settings(temperature=1.3, top_p=0.9, frequency_penalty=0.7, seed=11)
    bench, logits = Bench(device, 200), rows(1, 200, spread=0.5)
    bench.open(1, settings, prompt=[1, 2])
    whole = [bench(logits, [1])[0] for _ in range(6)]
    bench.open(5, settings, prompt=[1, 2], generated=whole[:3])
    assert [bench(logits, [5])[0] for _ in range(3)] == whole[3:]


def test_a_slot_forgets_its_last_holder(device: torch.device) -> None:
    bench, logits = Bench(device, 200), rows(1, 200)
    penalised = Settings(temperature=0.0, repetition_penalty=5.0, min_tokens=9)
    favourite = int(logits[0].argmax())
    bench.open(0, penalised, prompt=[favourite], stops=[3], bias={9: 100.0})
    assert bench(logits, [0]) == [9]
    bench.open(0, penalised, prompt=[4], bias={8: 0.5})
    assert bench(logits, [0]) == [favourite]
    bench.open(0, Settings(temperature=0.0))
    assert bench(logits, [0]) == [favourite]


def test_company_slot_and_row_do_not_matter(device: torch.device) -> None:
    settings = Settings(temperature=1.2, top_k=30, top_p=0.9, seed=77)
    logits = rows(5, 300)
    alone = Bench(device, 300)
    alone.open(0, settings)
    expected = [alone(logits[2:3], [0])[0] for _ in range(4)]
    crowd = Bench(device, 300)
    for slot in range(6):
        crowd.open(slot, Settings(seed=slot, temperature=slot / 2))
    crowd.open(4, settings)
    assert [crowd(logits, [0, 3, 4, 5, 1])[2] for _ in range(4)] == expected


def test_seeds_and_positions_decide(device: torch.device) -> None:
    """Every half of the seed and the number of tokens generated change the draw; nothing else does."""
    bench, logits = Bench(device, 300), np.zeros((5, 300), dtype=np.float32)
    for slot, (seed, count) in enumerate([(1, 0), (1, 0), (2, 0), (1 + 2**32, 0), (1, 1)]):
        bench.open(slot, Settings(seed=seed), generated=[0] * count)
    drawn = bench(logits, [0, 1, 2, 3, 4])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[1:])) == 4


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "drawn"])
def test_rows_without_a_finite_maximum_are_flagged(device: torch.device, temperature: float) -> None:
    bench, logits = Bench(device, 200), rows(5, 200)
    logits[0, 150] = np.nan
    logits[1, 3] = np.inf
    logits[2] = -np.inf
    logits[3, :150] = -np.inf
    for slot in range(5):
        bench.open(slot, Settings(temperature=temperature, top_k=5, seed=slot))
    drawn = bench(logits, [0, 1, 2, 3, 4])
    assert drawn[:3] == [-1, -1, -1]
    assert drawn[3] >= 150 and drawn[4] >= 0
    assert bench.state.tokens[:3].tolist() == [0, 0, 0], "the next step reads an embedding with it"


def test_padding_rows_do_nothing(device: torch.device) -> None:
    bench, logits = Bench(device, 200), rows(3, 200)
    logits[[0, 2]] = np.nan
    bench.open(0, Settings(temperature=0.0))
    before = bench.state.settings.clone(), bench.state.tokens.clone()
    assert bench(logits, [-1, 0, -4]) == [UNTOUCHED, int(logits[1].argmax()), UNTOUCHED]
    assert torch.equal(before[0][1:], bench.state.settings[1:])
    assert torch.equal(before[1][1:], bench.state.tokens[1:])


def test_philox_is_the_published_one() -> None:
    assert reference.philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_reference_is_the_sampler_of_the_server(name: str) -> None:
    settings = replace(SETTINGS[name], repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.1)
    settings = replace(settings, min_tokens=9)
    logits, prompt, generated, bias = rows(1, 300)[0], (3, 4, 4), [5, 6, 6], {7: 2.0, 4: -1.0}
    names = [f for f in vars(settings) if f != "seed"]
    params = SamplingParams(**{n: getattr(settings, n) for n in names}, logit_bias=bias)
    sampler = Sampler(params, prompt, eos=(8, 9))
    for token in generated:
        sampler.record(token)
    x = reference.adjusted(logits, settings, prompt=prompt, generated=generated, stops=(8, 9), bias=bias)
    assert np.array_equal(x, sampler._adjust(logits, len(generated)))
    weights = np.exp((x.astype(np.float64) - x.max()) / max(settings.temperature, 1e-5))
    ids, left = sampler._candidates(weights)
    left = left * (left >= settings.min_p)
    probabilities = np.zeros(len(x))
    probabilities[ids] = left / left.sum()
    assert np.allclose(probabilities, reference.distribution(x, settings), rtol=1e-12, atol=0)
