"""A packed model that is kept: what is read again is what was packed; a file that is not right is no file."""

from __future__ import annotations

import logging
import os
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nybble.config import ServeConfig
from nybble.engine.build import build_engine
from nybble.engine.engine import Engine
from nybble_kernels.numba.program import DecodeProgram
from nybble_kernels.quantized import QuantizedTensor, Weight
from nybble_models import packed, paged
from nybble_models.checkpoint import Checkpoint
from nybble_models.loader import Loader
from nybble_models.packed import PackedFile
from nybble_models.program import build_program
from nybble_models.spec import ModelSpec
from nybble_models.weights import Weights
from support_checkpoint import write_checkpoint
from support_program import decode
from support_runner import Collector, request
from support_tiny import CONFIGS, round_to_nearest, tiny_spec, tiny_weights

TOKENS = [1, 40, 7, 96, 3]


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SMALLEST", 0)


def program(spec: ModelSpec, weights: Weights, head: Weight, threads: int, **options: Any) -> DecodeProgram:
    kv = paged.allocate(spec, 8, 16).fill_(float("nan"))
    return build_program(spec, weights, kv, head=lambda: head, threads=threads, max_batch=2, **options)


def logits_of(made: DecodeProgram, spec: ModelSpec) -> Tensor:
    return decode(made, TOKENS, [3, 1], spec.vocab_size)


def kept_and_read(
    path: Path, spec: ModelSpec, weights: Weights, head: Weight, threads: int = 1
) -> tuple[DecodeProgram, DecodeProgram]:
    """The program that was packed, and the one that was made of its file alone."""
    file = PackedFile(path / "m.packed", "key")
    first = program(spec, weights, head, threads, keep=file.write)
    again = file.read()
    assert again is not None
    hollow = replace(weights, blocks=[])
    return first, program(spec, hollow, torch.empty(0), threads, packed=again)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_kept_model_gives_the_same_bits(tmp_path: Path, family: str, threads: int) -> None:
    spec = tiny_spec(family)
    weights = tiny_weights(spec)
    stored = weights.embed if weights.head is None else weights.head.weight
    assert isinstance(stored, Tensor)
    head = round_to_nearest(stored, 32, bits=8)
    first, again = kept_and_read(tmp_path, spec, weights, head, threads)
    torch.testing.assert_close(logits_of(again, spec), logits_of(first, spec), rtol=0, atol=0)
    assert again.weight_bytes_per_step == first.weight_bytes_per_step
    names = [(0, "qkv"), (1, "down")]
    assert [again.linear(*n).shape for n in names] == [first.linear(*n).shape for n in names]


def test_partners_apart_floats_and_orders_of_their_own(tmp_path: Path) -> None:
    spec = tiny_spec("llama", tie_word_embeddings=False)
    weights = tiny_weights(spec)
    linears = weights.blocks[0].linears
    shape = linears["q"].weight.shape
    linears["q"].weight = torch.randn(shape)
    linears["v"].weight = round_to_nearest(torch.randn(linears["v"].weight.shape), 32, bits=3)
    down = linears["down"].weight
    assert isinstance(down, QuantizedTensor)
    linears["down"].weight = replace(down, permutation=torch.randperm(down.in_features))
    assert isinstance(weights.embed, Tensor)
    weights.embed = round_to_nearest(weights.embed, 32, bits=8)
    assert weights.head is not None
    first, again = kept_and_read(tmp_path, spec, weights, weights.head.weight)
    torch.testing.assert_close(logits_of(again, spec), logits_of(first, spec), rtol=0, atol=0)


def small_file(path: Path) -> PackedFile:
    spec = tiny_spec("llama")
    weights = tiny_weights(spec)
    assert isinstance(weights.embed, Tensor)
    file = PackedFile(path / "kept" / "m.packed", "key")
    program(spec, weights, round_to_nearest(weights.embed, 32), 1, keep=file.write)
    return file


def test_a_file_of_something_else_is_no_file(tmp_path: Path) -> None:
    file = small_file(tmp_path)
    assert file.read() is not None
    assert PackedFile(file.path, "another").read() is None
    assert PackedFile(tmp_path / "none", "key").read() is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-1],
        lambda b: b[:100],
        lambda b: b"",
        lambda b: b"\xff" * len(b),
        lambda b: b[:8] + b"{}",
        lambda b: b"A" * len(b),
    ],
)
def test_a_damaged_file_is_named_and_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    file = small_file(tmp_path)
    file.path.write_bytes(damage(file.path.read_bytes()))
    assert file.read() is None
    assert str(file.path) in caplog.text


def test_a_full_disk_and_a_folder_that_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_file(tmp_path).read()
    assert model is not None
    (tmp_path / "taken").write_text("a file, not a folder")
    PackedFile(tmp_path / "taken" / "m.packed", "key").write(model)
    assert "not kept" in caplog.text
    caplog.clear()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, packed.SPARE))
    PackedFile(tmp_path / "full" / "m.packed", "key").write(model)
    assert "not kept" in caplog.text
    assert not list((tmp_path / "full").iterdir())


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = small_file(tmp_path)
    model = file.read()
    assert model is not None

    def fails(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    file.write(model)
    assert [each.name for each in file.path.parent.iterdir()] == ["m.packed"]
    assert file.read() is not None


def test_small_models_are_not_kept_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = small_file(tmp_path)
    old, young = file.path.with_name("old.packed"), file.path.with_name("young.packed")
    for each in (old, young):
        each.write_bytes(b"x")
    os.utime(old, (0, time.time() - packed.UNUSED - 1))
    killed, going = file.path.with_name("killed.part"), file.path.with_name("going.part")
    for each in (killed, going):
        each.write_bytes(b"x")
    os.utime(killed, (0, time.time() - packed.KILLED - 1))
    model = file.read()
    assert model is not None
    file.write(model)
    assert young.exists() and not old.exists()
    assert going.exists() and not killed.exists()
    monkeypatch.setattr(packed, "SMALLEST", 1 << 30)
    PackedFile(tmp_path / "kept" / "big.packed", "key").write(model)
    assert not (tmp_path / "kept" / "big.packed").exists()


def test_a_file_that_cannot_be_touched_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = small_file(tmp_path)

    def refused(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "utime", refused)
    assert file.read() is not None


def test_the_key_follows_model_settings_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    model = write_checkpoint(tmp_path / "model")
    weights = model / "model.safetensors"

    def made(*settings: object) -> PackedFile:
        return PackedFile.of(Checkpoint(model).files(), tmp_path, *settings)

    first = made(2, 8)
    (model / "README.md").write_text("prose")
    assert (made(2, 8).key, made(2, 8).path) == (first.key, first.path)
    assert made(1, 8).key != first.key
    assert made(1, 8).path != first.path  # two settings in turn do not take each other's place
    before = weights.stat()
    weights.write_bytes(weights.read_bytes())
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # it claims to be as old as it was
    again = made(2, 8)
    assert (again.path, again.key == first.key) == (first.path, False)
    monkeypatch.setattr(packed, "_code", lambda: "new code")
    assert made(2, 8).key not in (first.key, again.key)
    (model / "quantize_config.json").symlink_to(tmp_path / "gone")
    assert made(2, 8).path == first.path


def answers(engine: Engine) -> list[int]:
    sink = Collector()
    engine.submit(request("a", [5, 6, 7, 8], 12), sink)
    sink.wait()
    return list(sink.tokens)


def test_the_second_start_reads_no_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    model = write_checkpoint(tmp_path / "model")
    config = ServeConfig(
        model=str(model), kernels="numba", kv_cache_tokens=512, threads=1, cache_dir=str(tmp_path)
    )
    engine = build_engine(config, lambda phase, part: None)
    expected, told = answers(engine), engine.info
    engine.stop()

    def none(*_: object) -> None:
        raise AssertionError("a matrix was read")

    for part in ("blocks", "block", "embed"):
        monkeypatch.setattr(Loader, part, none)
    engine = build_engine(config, lambda phase, part: None)
    assert answers(engine) == expected
    assert (engine.info.quantization, engine.info.weight_bytes) == (told.quantization, told.weight_bytes)
    engine.stop()
    with pytest.raises(AssertionError, match="a matrix was read"):
        build_engine(replace(config, packed_cache=False), lambda phase, part: None)
    assert not caplog.text


@pytest.mark.parametrize("settings", [{"packed_cache": False}, {"dtype": "float32"}, {"kernels": "torch"}])
def test_where_nothing_is_kept(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = write_checkpoint(tmp_path / "model")
    options: dict[str, Any] = {"kernels": "numba", "kv_cache_tokens": 512, "threads": 1}
    config = ServeConfig(model=str(model), cache_dir=str(tmp_path), **(options | settings))
    build_engine(config, lambda phase, part: None).stop()
    assert not (tmp_path / "packed").exists()
