"""An engine of random weights: what `nybble serve` builds, but for the files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from part import Part
from random_models import random_block, random_weights
from shapes import MODELS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nybble_models.weights import Block, Linear, Norm

POSITIONS = 4096


class RandomLoader:
    """A `Loader` without files. Every layer is the same block, packed into memory of its own."""

    def __init__(self, name: str, kind: str, device: str) -> None:
        self.spec = MODELS[name]
        self.settings = {"quant_method": "random", "bits": 4, "group_size": 128}
        self.source = SimpleNamespace(config={"dtype": "bfloat16"})
        self._weights = random_weights(self.spec, device)
        self._block = random_block(self.spec, kind, device)

    def embed(self) -> Any:
        return self._weights.embed

    def positions(self) -> Any:
        return self._weights.positions

    def final_norm(self) -> Norm:
        return self._weights.final_norm

    def head(self) -> Linear | None:
        return self._weights.head

    def block(self, layer: int) -> Block:
        return self._block


def random_engine(part: Part, folder: Path, model: str, kind: str, name: str) -> tuple[Any, Any]:
    """(engine, its settings). A dry run takes a tiny checkpoint and the reference kernels."""
    from nybble.config import ServeConfig

    shared = {"model": str(folder), "served_model_name": (name,), "port": 0, "kv_cache_tokens": POSITIONS}
    if part.dry:
        return tiny_engine(folder, ServeConfig(**shared, device="cpu", kernels="reference", threads=1))
    write_tokenizer(folder, MODELS[model].vocab_size)
    config = ServeConfig(
        **shared, device="cuda", max_num_seqs=4, max_model_len=POSITIONS, max_num_batched_tokens=2048
    )
    return device_engine(folder, config, RandomLoader(model, kind, part.device)), config


def device_engine(folder: Path, config: Any, loader: Any) -> Any:
    """The steps of `build_engine` after the loader."""
    from nybble.engine import gpu
    from nybble.engine.build import _plan, describe
    from nybble.engine.built import Timer
    from nybble.engine.engine import Engine

    timer = Timer(lambda phase, part: None)
    planned = _plan(config, loader, gpu)
    built = gpu.build(config, loader, planned, timer)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))
    info = describe(config, folder, loader, built, planned, timer)
    engine = Engine(info, built.runner, max_sequences=config.max_num_seqs)
    engine.start()
    return engine


def tiny_engine(folder: Path, config: Any) -> tuple[Any, Any]:
    from nybble.engine.build import build_engine
    from support_checkpoint import write_checkpoint

    path = write_checkpoint(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": POSITIONS}))
    return build_engine(config, lambda phase, part: None), config


def write_tokenizer(folder: Path, size: int) -> None:
    """`size` tokens: the bytes, then words of no meaning, so that every id a random model says has a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {text: number for number, text in enumerate(alphabet)}
    words |= {f"w{number}": number for number in range(len(alphabet), size)}
    core = Tokenizer(models.BPE(vocab=words, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": POSITIONS}))
