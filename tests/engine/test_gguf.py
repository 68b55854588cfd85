"""GGUF files served as they are: what the levels mean is what every kernel answers."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from nybble.config import ServeConfig
from nybble.engine.build import build_engine
from nybble.inspection import inspect_model
from nybble_kernels.quantized import QuantizedTensor
from nybble_models import paged
from nybble_models.decoder import Decoder
from nybble_models.footprint import linear_held_as, tables_held_as
from nybble_models.formats.gguf import Gguf
from nybble_models.loader import Loader
from nybble_models.plan import weight_bytes
from nybble_models.torch_step import TorchStep
from support_gguf import write_gguf
from support_program import TOLERANCE, decode, error, program_of
from support_runner import Collector, request
from support_tiny import tiny_spec, tiny_weights

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
VOCABULARY = 96
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 58, 9, 79, 3]
TABLE = [5, 1, 7, 3]

FILES: dict[str, dict[str, Any]] = {
    "Q4_0": {"kind": Kind.Q4_0},
    "Q4_1": {"kind": Kind.Q4_1, "kinds": {"token_embd": Kind.Q8_0}},
    "Q8_0": {"kind": Kind.Q8_0, "kinds": {"token_embd": Kind.Q8_0}},
    "Q4_1 table": {"kind": Kind.Q4_0, "kinds": {"token_embd": Kind.Q4_1}},
    "Q5_0": {"kind": Kind.Q5_0},
    "mixed": {
        "kind": Kind.Q4_0,
        "kinds": {
            "token_embd": Kind.Q8_0,
            "attn_v": Kind.Q8_0,
            "0.attn_k": Kind.F16,
            "ffn_gate": Kind.Q4_1,
            "ffn_down": Kind.Q6_K,
        },
    },
}


def written(directory: Path, name: str, family: str = "llama") -> Path:
    """256 inputs of `down`: a super-block."""
    changes = {"use_sliding_window": False} if family == "qwen2" else {}
    spec = tiny_spec(family, intermediate_size=256, vocab_size=VOCABULARY, **changes)
    weights = tiny_weights(spec, group_size=None)
    return write_gguf(directory / "m.gguf", family, spec, weights, tokens=VOCABULARY, **FILES[name])


def meant(path: Path, tokens: list[int]) -> Tensor:
    """Logits of the dequantized model."""
    loader = Loader(Gguf(path), floats=True)
    return Decoder(loader.spec, loader.load()).forward(torch.tensor(tokens))


@pytest.mark.parametrize("family", ["llama", "qwen2"], ids=["tied", "untied"])
@pytest.mark.parametrize("name", FILES)
def test_levels_mean_the_dequantized_model_bit_for_bit(tmp_path: Path, name: str, family: str) -> None:
    path = written(tmp_path, name, family)
    loader = Loader(Gguf(path))
    weights = loader.load()
    exact = [x.weight for block in weights.blocks for x in block.linears.values()]
    assert sum(isinstance(w, QuantizedTensor) for w in exact) == {"mixed": 17, "Q5_0": 0}.get(name, 21)
    assert torch.equal(Decoder(loader.spec, weights).forward(torch.tensor(TOKENS)), meant(path, TOKENS))


@pytest.mark.parametrize("family", ["llama", "qwen2"], ids=["tied", "untied"])
@pytest.mark.parametrize("name", FILES)
def test_compiled_steps_follow_the_dequantized_model(tmp_path: Path, name: str, family: str) -> None:
    path = written(tmp_path, name, family)
    loader = Loader(Gguf(path))
    program, _ = program_of(loader.spec, loader.load())
    tokens = torch.tensor(TOKENS)
    assert torch.equal(program.embedding(tokens), _rows(path, tokens))
    found = decode(program, TOKENS, TABLE, VOCABULARY)
    assert error(found, meant(path, TOKENS)) < TOLERANCE["whole step"]


def _rows(path: Path, tokens: Tensor) -> Tensor:
    return Gguf(path).tensor("model.embed_tokens.weight")[tokens]


@pytest.mark.parametrize("name", FILES)
def test_torch_steps_follow_the_dequantized_model(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name)
    loader = Loader(Gguf(path))
    weights, truth = loader.load(), meant(path, TOKENS)
    assert isinstance(weights.embed, (Tensor, QuantizedTensor))
    for make, limit in ((TorchStep.reference, 0.02), (TorchStep, TOLERANCE["whole step"])):
        kv = paged.allocate(loader.spec, 8, 16)
        step = make(loader.spec, weights, kv, weights.embed)
        made = torch.empty(len(TOKENS), VOCABULARY)
        table = torch.tensor([TABLE], dtype=torch.int32)
        for i, token in enumerate(TOKENS):
            one = np.array([token], np.int32), np.array([i], np.int32)
            step.step(*one, table, made[i : i + 1])
        assert error(made, truth) < limit  # the cache is bfloat16


@pytest.mark.parametrize("kernels", ["numba", "torch", "reference", "triton"])
def test_an_engine_serves_the_file_itself(
    tmp_path: Path, kernels: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path, "mixed")
    small: dict[str, Any] = {"kv_cache_tokens": 256, "threads": 1}
    if kernels == "triton":
        small |= {"max_num_seqs": 1, "max_num_batched_tokens": 16}
        kernels = "triton" if INTERPRETED else "auto"
    config = ServeConfig(
        model=str(path), quantization="none", kernels=kernels, cache_dir=str(tmp_path / "cache"), **small
    )
    with caplog.at_level(logging.INFO):
        engine = build_engine(config, lambda phase, part: None)
    sink = Collector()
    engine.submit(request("a", TOKENS, 3), sink)
    made = sink.wait(240).tokens
    engine.stop()
    assert engine.info.quantization == "gguf int4 g32 symmetric"
    assert "11 Q4_0, 4 Q8_0, 3 Q4_1; as floats: 3 Q6_K, 1 F16" in caplog.text
    rows = meant(path, TOKENS + made[:-1])[len(TOKENS) - 1 :]
    margins = [float(row.max() - row[token]) for row, token in zip(rows, made, strict=True)]
    assert max(margins) < 0.15 * float(rows.std())
    (folder,) = (tmp_path / "cache" / "models").iterdir()
    assert Path(engine.info.directory) == folder
    assert {f.name for f in folder.iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}
    if kernels == "numba":  # the others hold some levels as floats
        planned, held = engine.info.planned_bytes["weights"], sum(engine.info.weight_bytes.values())
        assert held == pytest.approx(planned, rel=0.15)  # rows are filled up to 64


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
def test_planned_bytes_are_those_of_the_file(tmp_path: Path, name: str) -> None:
    loader = Loader(Gguf(written(tmp_path, name)))
    linears = sum(
        linear_held_as(loader, layer, p).nbytes(*loader.spec.shape(p))
        for layer in range(3)
        for p in loader.spec.projections
    )
    stored = {"Q4_0": 4.5, "Q4_1": 5, "Q8_0": 8.5}[name] + {"Q4_0": 4, "Q4_1": 0, "Q8_0": 8}[name] / 32
    weights = sum(np.prod(loader.spec.shape(p)) for p in loader.spec.projections) * 3
    assert linears == weights * stored / 8
    head, embedding = tables_held_as(loader, 8)
    assert head.bits == 8
    assert (embedding.bits == 16) == (name == "Q4_0")
    shared = weight_bytes(loader.spec, lambda layer, p: linear_held_as(loader, layer, p), head)
    assert shared == linears + head.nbytes(VOCABULARY, 64)


@pytest.mark.parametrize(
    ("name", "method", "group", "symmetric"),
    [
        ("Q4_0", "gguf Q4_0", 32, True),
        ("Q4_1", "gguf Q4_1", 32, False),
        ("Q8_0", "gguf Q8_0", 32, True),
        ("mixed", "gguf Q4_0", 32, True),
        ("Q5_0", "gguf Q5_0", None, None),
    ],
)
def test_inspection_says_what_most_weights_are(
    tmp_path: Path, name: str, method: str, group: int | None, symmetric: bool | None
) -> None:
    found = inspect_model(written(tmp_path, name))
    assert (found.method, found.group_size, found.symmetric) == (method, group, symmetric)


def test_inspection_of_a_float_file(tmp_path: Path) -> None:
    spec = tiny_spec("llama")
    path = write_gguf(tmp_path / "m.gguf", "llama", spec, tiny_weights(spec, group_size=None))
    assert inspect_model(path).method == "none"
