"""A whole engine from a folder: every kernel path answers as the reference decoder does, in any company."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.config import ServeConfig
from nybble.engine.build import build_engine
from nybble.engine.engine import Engine
from nybble.errors import UsageError
from nybble_models.checkpoint import Checkpoint
from nybble_models.decoder import Decoder, ReferenceCache
from nybble_models.loader import Loader
from support_checkpoint import VOCABULARY, write_checkpoint
from support_runner import Collector, request
from support_tiny import CONFIGS

KERNELS = ("numba", "torch", "reference")


def build(directory: Path, **settings: Any) -> Engine:
    options: dict[str, Any] = {"kernels": "torch", "kv_cache_tokens": 1024, "threads": 1} | settings
    return build_engine(ServeConfig(model=str(directory), **options), lambda phase, part: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def answer(engine: Engine, name: str, prompt: list[int], max_tokens: int, **params: Any) -> Collector:
    sink = Collector()
    engine.submit(request(name, prompt, max_tokens, **params), sink)
    return sink


def greedy_margins(directory: Path, prompt: list[int], made: list[int]) -> list[float]:
    """For each made token: how far its reference logit lies below the best, given the same past."""
    loader = Loader(Checkpoint(directory))
    decoder, cache = Decoder(loader.spec, loader.load()), ReferenceCache(loader.spec)
    logits = decoder.forward(torch.tensor(prompt + made[:-1]), cache)[len(prompt) - 1 :]
    spread = float(logits.std())
    return [float(row.max() - row[token]) / spread for row, token in zip(logits, made, strict=True)]


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_answers_follow_the_reference(tmp_path: Path, family: str, kernels: str) -> None:
    directory = write_checkpoint(tmp_path, family)
    engine = build(directory, kernels=kernels)
    prompt = [random.Random(1).randrange(256) for _ in range(37)]
    made = answer(engine, "a", prompt, 24).wait().tokens
    engine.stop()
    assert len(made) == 24
    assert max(greedy_margins(directory, prompt, made)) < 0.15
    assert engine.info.family == family


def test_answers_do_not_depend_on_company(folder: Path, kernels: str) -> None:
    """Batches, chunked prompts, cached prefixes and preemptions leave every bit of an answer in place."""
    chance = random.Random(4)
    shared = [chance.randrange(256) for _ in range(40)]
    prompts = [
        shared[: chance.randrange(1, 40)] + [chance.randrange(256) for _ in range(i)] for i in range(1, 18)
    ]
    alone = build(folder, kernels=kernels, prefix_cache=False)
    expected = [answer(alone, str(i), p, 20, logprobs=1).wait().deltas for i, p in enumerate(prompts)]
    alone.stop()
    crowded = build(folder, kernels=kernels, kv_cache_tokens=192, max_num_batched_tokens=24, max_model_len=96)
    sinks = [answer(crowded, str(i), p, 20, logprobs=1) for i, p in enumerate(prompts)]
    got = [sink.wait().deltas for sink in sinks]
    stats = crowded.stats()
    crowded.stop()
    assert stats.preemptions > 0
    assert stats.prefix_hit_tokens > 0
    for mine, theirs in zip(got, expected, strict=True):
        assert [d.token for d in mine] == [d.token for d in theirs]
        assert [d.logprob for d in mine] == [d.logprob for d in theirs]


def test_prompt_logprobs_follow_the_reference(folder: Path, kernels: str) -> None:
    engine = build(folder, kernels=kernels, max_num_batched_tokens=17)
    prompt = [random.Random(2).randrange(256) for _ in range(50)]
    scored = answer(engine, "a", prompt, 0, prompt_logprobs=True).wait().deltas[0].prompt_logprobs
    engine.stop()
    loader = Loader(Checkpoint(folder))
    logits = Decoder(loader.spec, loader.load()).forward(torch.tensor(prompt)).log_softmax(-1)
    assert scored is not None
    missed = []
    for position, each in enumerate(scored[1:]):
        assert each is not None
        missed.append(each.logprob - float(logits[position, each.token]))
    spread = float(logits.std())  # 8-bit activations, and a head of 8 bits, are about 1 % of it
    assert float(torch.tensor(missed).square().mean().sqrt()) < 0.02 * spread
    assert max(map(abs, missed)) < 0.06 * spread


def test_unquantized_folders_are_served_as_they_are(tmp_path: Path, kernels: str) -> None:
    directory = write_checkpoint(tmp_path, group_size=None)
    engine = build(directory, kernels=kernels, quantization="none")
    made = answer(engine, "a", list(range(20)), 12).wait().tokens
    engine.stop()
    assert engine.info.quantization == "none"
    assert max(greedy_margins(directory, list(range(20)), made)) < 0.15


def test_info_states_facts(folder: Path) -> None:
    engine = build(folder, max_model_len=128)
    info = engine.info
    engine.stop()
    assert info.quantization == "awq int4 g32 asymmetric"
    assert (info.vocab_size, info.max_model_len, info.num_blocks, info.block_size) == (
        VOCABULARY,
        128,
        64,
        16,
    )
    assert info.eos_token_ids == (259,)
    assert info.bandwidth > 1e8
    assert {"prepare", "load", "pack", "warm-up"} <= set(info.load_seconds)
    assert info.planned_bytes["kv"] == engine.stats().used_bytes["kv"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"device": "cuda"}, "GPU"),
        ({"max_model_len": 4096}, "160 positions"),
        ({"block_size": 24}, "multiple of 16"),
        ({"head_bits": 4}, "head_bits"),
    ],
    ids=["cuda", "length", "block-size", "head"],
)
def test_settings_that_cannot_be_met_are_refused(folder: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        build(folder, **settings)
