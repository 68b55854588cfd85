"""`nybble convert`: one line on success, one line and a hint for what cannot be."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from nybble import cli
from nybble_models.checkpoint import Checkpoint
from nybble_models.loader import Loader
from nybble_quantizers.pipeline import quantize
from nybble_quantizers.scheme import preset
from support_checkpoint import write_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return write_checkpoint(tmp_path / "in")


def test_a_checkpoint_is_converted_and_summed_up(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder.parent / "out"
    assert cli.main(["convert", str(folder), "-o", str(out), "--format", "gptq_v2"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{out}: gptq_v2, 21 linears packed, ")
    assert line.endswith("no value changed")
    assert Loader(Checkpoint(out)).settings["quant_method"] == "gptq"
    assert {f.name for f in out.iterdir()} >= {"tokenizer.json", "SHA256SUMS", "model.safetensors"}


@pytest.mark.parametrize(
    ("spoil", "arguments", "says"),
    [
        (None, ["--format", "gguf"], "gguf"),
        (None, ["--format", "awq", "-o", "in"], "in: exists already"),
        ("missing", ["--format", "awq"], "does not exist"),
        ("config", ["--format", "awq"], "config.json is missing"),
        ("cut", ["--format", "awq"], "not a whole safetensors file"),
        ("other", ["--format", "awq"], "quantization method 'hqq' is not supported"),
        ("float", ["--format", "awq"], "no linear of it is quantized"),
        ("FP8", ["--format", "gptq"], "q_proj: 8-bit floats need compressed-tensors"),
        ("W8A8", ["--format", "awq"], "q_proj: rounded inputs need compressed-tensors"),
    ],
    ids=["format", "output", "no folder", "no config", "cut", "method", "floats", "FP8", "W8A8"],
)
def test_what_cannot_be_is_two_lines_and_leaves_nothing(
    folder: Path,
    spoil: str | None,
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder.parent)
    source = "nothing/here.gguf" if spoil == "missing" else "in"
    config = json.loads((folder / "config.json").read_text())
    if spoil == "config":
        (folder / "config.json").unlink()
    elif spoil == "cut":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
    elif spoil == "other":
        changed = config | {"quantization_config": {"quant_method": "hqq"}}
        (folder / "config.json").write_text(json.dumps(changed))
    elif spoil == "float":
        write_checkpoint(folder, group_size=None)
    elif spoil in ("FP8", "W8A8"):
        write_checkpoint(folder, group_size=None)
        scheme = replace(preset(spoil), method="rtn")
        quantize(folder, folder.parent / "made", scheme)
        shutil.rmtree(folder)
        (folder.parent / "made").rename(folder)
    output = [] if "-o" in arguments else ["-o", "out"]
    assert cli.main(["convert", source, *output, *arguments]) == 2
    *_, first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert says in first
    assert second.startswith("hint: ")
    assert [f.name for f in folder.parent.iterdir()] == ["in"]
