"""The whole engine on the Triton path: on a GPU, or in the interpreter with a model of one small layer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.config import ServeConfig
from nybble.engine.build import build_engine, device_of
from nybble.engine.engine import Engine
from nybble.engine.gpu_runner import bucket_of, buckets
from nybble.errors import UsageError
from nybble.tuning import default_file, tune_model
from nybble_kernels.triton.tiles import Cut, Tuning
from nybble_models.checkpoint import Checkpoint
from nybble_models.decoder import Decoder
from nybble_models.loader import Loader
from support_checkpoint import write_checkpoint
from support_runner import Collector, request

NEW = 4  # tokens of an answer
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="Triton compiles, and there is no GPU"
)


def build(directory: Path, **settings: Any) -> Engine:
    options: dict[str, Any] = {
        "kernels": "triton" if INTERPRETED else "auto",
        "dtype": "float16",
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
    }
    return build_engine(ServeConfig(model=str(directory), **(options | settings)), lambda phase, part: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    return write_checkpoint(directory, num_hidden_layers=1, intermediate_size=64)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    """Five blocks of 16 tokens: too few for what the tests ask at once."""
    made = build(folder, kv_cache_tokens=80, max_model_len=64)
    yield made
    made.stop()


def ask(engine: Engine, name: str, prompt: list[int], max_tokens: int, **params: Any) -> Collector:
    sink = Collector()
    engine.submit(request(name, prompt, max_tokens, **params), sink)
    return sink


def test_greedy_answer_follows_the_reference(folder: Path, engine: Engine) -> None:
    prompt = [7, 30, 99, 12, 55]
    sink = ask(engine, "greedy", prompt, 3, ignore_eos=True, temperature=0.0, logprobs=1).wait(120)
    loader = Loader(Checkpoint(folder))
    logits = Decoder(loader.spec, loader.load()).forward(torch.tensor(prompt + sink.tokens[:-1]))
    for token, scores in zip(sink.tokens, logits[len(prompt) - 1 :], strict=True):
        assert float(scores.max() - scores[token]) < 0.05 * float(scores.std())


def test_answers_do_not_depend_on_company(engine: Engine) -> None:
    """Batching, a shared prefix, preemption and an abort leave every finished answer as it is alone."""
    shared = list(range(10, 26))
    asked: dict[str, tuple[list[int], dict[str, Any]]] = {
        "a": ([*shared, 3], {"temperature": 0.0}),
        "b": ([*shared, 4], {"temperature": 1.0, "seed": 5}),
        "c": ([9] * 14, {"temperature": 0.9, "top_p": 0.9, "seed": 6, "repetition_penalty": 1.3}),
        "d": ([*shared, 5], {"temperature": 0.0}),
    }
    sinks = {
        name: ask(engine, name, prompt, NEW, ignore_eos=True, **params)
        for name, (prompt, params) in asked.items()
    }
    engine.abort("d")
    together = {name: sink.wait(240).tokens for name, sink in sinks.items() if name != "d"}
    assert engine.stats().preemptions > 0, "the test needs a cache that is too small"
    for name, (prompt, params) in asked.items():
        if name != "d":
            alone = ask(engine, f"{name} alone", prompt, NEW, ignore_eos=True, **params).wait(240)
            assert alone.tokens == together[name]
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.blocks_live) == (0, 0, 0)


def test_prompt_scores_and_info(engine: Engine) -> None:
    sink = ask(engine, "score", [5, 6, 7, 8], 0, prompt_logprobs=True).wait(120)
    scores = sink.deltas[0].prompt_logprobs
    assert scores is not None
    assert [entry is None for entry in scores] == [True, False, False, False]
    assert engine.info.kernels["decode"] == "triton w4a16 w8a16"
    assert engine.info.dtype == "float16"
    assert engine.info.bandwidth > 0


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        pytest.param({"dtype": "float32"}, "dtype: float32", id="dtype"),
        pytest.param({"head_bits": 4}, "head_bits: 4", id="head"),
    ],
)
def test_unusable_settings_are_named(folder: Path, settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        build(folder, **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
@pytest.mark.parametrize(
    ("settings", "complaint"),
    [({"device": "cuda"}, "device: cuda"), ({"kernels": "triton"}, "kernels: triton")],
    ids=["device", "kernels"],
)
def test_missing_gpu_is_named(
    settings: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UsageError, match=complaint):
        device_of(ServeConfig(**settings))


def test_buckets_double_up_to_the_batch() -> None:
    assert buckets(1) == [1]
    assert buckets(12) == [1, 2, 4, 8, 12]
    assert [bucket_of(rows, 12) for rows in (1, 3, 9, 12)] == [1, 4, 12, 12]


def test_tuning_writes_what_serving_reads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nybble_kernels.triton import search

    monkeypatch.setattr(search, "ROWS", {"decode": (1,), "prefill": (2,)})
    monkeypatch.setattr(search, "candidates", lambda kind, inputs, phase: [Cut(4, 1, 1, 1), Cut(8, 1, 1, 1)])
    lines: list[str] = []
    config = ServeConfig(
        model=str(folder), kernels="triton" if INTERPRETED else "auto", cache_dir=str(tmp_path)
    )
    saved: list[Tuning] = []
    tune_model(config, 1, lines.append, saved.append)
    assert len(saved) == len(lines), "what was found is kept after every product"
    table = saved[-1]
    assert default_file(config).parent == tmp_path / "tuned"
    assert {name.split()[0] for name in table.cuts} == {"w4a16", "w8a16"}
    assert len(lines) == len(table.cuts) == 2 * len({name.rsplit(" ", 1)[0] for name in table.cuts})
    again = Tuning.from_json(json.loads(json.dumps(table.as_json())))
    assert again == table
