"""Weights of before safetensors are copied into safetensors: tensors only, and never half."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nybble_models.checkpoint import Checkpoint
from nybble_models.errors import BrokenCheckpoint
from nybble_models.loader import Loader
from support_originals import write_new, write_original

WHOLE = "pytorch_model.bin"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")


def copied(folder: Path, cache: Path) -> Path:
    from originals import as_safetensors

    made: Path = as_safetensors(folder, cache)
    return made


class Evil:
    """Makes a folder when it is read by a pickle that may run code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("prefix", ["", "model."], ids=["without its head", "with it"])
@pytest.mark.parametrize("files", [1, 2])
def test_the_same_model_comes_of_bin_files(tmp_path: Path, files: int, prefix: str, zipped: bool) -> None:
    new = write_new(tmp_path / "new")
    old = write_original(new, tmp_path / "old", files=files, prefix=prefix, zipped=zipped)
    made = copied(old, tmp_path / "cache")
    expected = dict(Loader(Checkpoint(new)).load().tensors())
    found = dict(Loader(Checkpoint(made)).load().tensors())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (made / "vocab.json").read_bytes() == (old / "vocab.json").read_bytes()
    before = (made / "config.json").stat().st_mtime_ns
    assert copied(old, tmp_path / "cache") == made
    assert (made / "config.json").stat().st_mtime_ns == before


def test_what_has_safetensors_is_left_alone(tmp_path: Path) -> None:
    """The pickle is not even looked at."""
    new = write_new(tmp_path / "new")
    torch.save(Evil(tmp_path / "ran"), new / WHOLE)
    assert copied(new, tmp_path / "cache") == new
    assert not (tmp_path / "ran").exists() and not (tmp_path / "cache").exists()


def test_tensors_that_share_memory_are_copied_apart(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    weight = torch.arange(6.0).view(2, 3)
    held = {"model.a": weight, "lm_head.b": weight, "model.c": torch.nn.Parameter(weight.T), "epoch": 3}
    torch.save(held, tmp_path / "old" / WHOLE)
    made = copied(tmp_path / "old", tmp_path / "cache")
    found = load_file(made / "model-00001-of-00001.safetensors")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "model.a": weight.tolist(),
        "lm_head.b": weight.tolist(),
        "model.c": weight.T.tolist(),
    }
    assert set(json.loads((made / "model.safetensors.index.json").read_text())["weight_map"]) == set(found)


def refused(folder: Path, cache: Path, says: str) -> None:
    with pytest.raises(BrokenCheckpoint, match=says) as caught:
        copied(folder, cache)
    assert "\n" not in str(caught.value) and caught.value.hint
    assert list((cache / "originals").iterdir()) == []


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_a_file_that_would_run_code_is_refused(tmp_path: Path, zipped: bool) -> None:
    (tmp_path / "old").mkdir()
    held = {"a": torch.ones(2), "b": Evil(tmp_path / "ran")}
    torch.save(held, tmp_path / "old" / WHOLE, _use_new_zipfile_serialization=zipped)
    refused(tmp_path / "old", tmp_path / "cache", r"holds more than tensors: 'posix\.mkdir'")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>" * 9, b"PK\x03\x04", b"\x80\x04."])
def test_what_is_no_weights_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / WHOLE).write_bytes(content)
    refused(tmp_path / "old", tmp_path / "cache", f"{WHOLE} is not a whole PyTorch file")


@pytest.mark.parametrize("count", [10, 1000, -100])
def test_a_file_cut_short_is_one_line(tmp_path: Path, count: int) -> None:
    old = write_original(write_new(tmp_path / "new"), tmp_path / "old", files=2)
    last = old / "pytorch_model-00002-of-00002.bin"
    last.write_bytes(last.read_bytes()[:count])
    refused(old, tmp_path / "cache", f"{last.name} is not a whole PyTorch file")


def test_what_holds_no_names_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    torch.save([torch.ones(2)], tmp_path / "old" / WHOLE)
    refused(tmp_path / "old", tmp_path / "cache", "does not hold tensors by name")
