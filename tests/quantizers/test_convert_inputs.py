"""Conversion of W8A8 and FP8: rounded inputs and 8-bit floats stay, or are refused with what would work."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nybble_models.checkpoint import Checkpoint
from nybble_models.decoder import Decoder
from nybble_models.errors import ModelError
from nybble_models.formats.compressed_tensors import FloatQuantizedCodec
from nybble_models.formats.container import Container
from nybble_models.formats.form import TENSOR
from nybble_models.loader import Loader
from nybble_models.weights import Linear
from nybble_quantizers.convert import convert
from nybble_quantizers.pipeline import quantize
from nybble_quantizers.scheme import Scheme, preset
from nybble_quantizers.verify import verify
from support_checkpoint import write_checkpoint

Change = Callable[[dict[str, Any], dict[str, Tensor]], None]
"""Of `quantization_config` and the tensors, in place."""

SMALL = {"samples": 2, "length": 16}
SCHEMES = {
    "w8a8": preset("W8A8", **SMALL),
    "w8a8-static": preset("W8A8-static", **SMALL),
    "fp8": preset("FP8"),
    "fp8-static": preset("FP8-static", **SMALL),
    "fp8-tensor": replace(preset("FP8-static", **SMALL), group_size=TENSOR),
    "fp8-weights": replace(preset("FP8"), inputs=None),
    "w4-tensor": Scheme(method="rtn", group_size=TENSOR),
}


def made(folder: Path, scheme: Scheme, **changes: Any) -> Path:
    """A tiny model, its config with `changes`, quantized."""
    plain = folder.with_name("plain")
    plain.mkdir()
    write_checkpoint(plain, group_size=None, **changes)
    quantize(plain, folder, scheme, command="nybble quantize")
    return folder


def changed(folder: Path, change: Change) -> Path:
    config = json.loads((folder / "config.json").read_text())
    stored = load_file(folder / "model.safetensors")
    change(config["quantization_config"], stored)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(stored, folder / "model.safetensors")
    return folder


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def logits(path: Path) -> Tensor:
    loader = Loader(Checkpoint(path))
    return Decoder(loader.spec, loader.load()).forward(torch.tensor([3, 1, 4, 1, 5, 9, 2, 6]))


@pytest.mark.parametrize("name", SCHEMES)
def test_what_compressed_tensors_holds_is_written_again(tmp_path: Path, name: str) -> None:
    """Tensor for tensor: levels, floats, scales of rows and of matrices, scales of inputs."""
    source = made(tmp_path / "in", SCHEMES[name])
    done = convert(source, tmp_path / "out", "compressed-tensors")
    assert (done.packed, done.loose, done.folded) == (21, (), 0)
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("in", "out"))
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    assert all(torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8)) for n in before)
    assert settings(source) == settings(tmp_path / "out")
    assert any(n.endswith("input_scale") for n in after) == (SCHEMES[name].inputs == "tensor")
    assert torch.equal(logits(source), logits(tmp_path / "out"))
    assert verify(tmp_path / "out").problems == []
    report = json.loads((tmp_path / "out" / "quant_report.json").read_text())
    assert report["command"] == "nybble quantize  # then nybble convert --format compressed-tensors"


def test_other_programs_spell_their_scales_otherwise(tmp_path: Path) -> None:
    """bfloat16, and without dimensions: the numbers stay."""

    def respelled(config: dict[str, Any], stored: dict[str, Tensor]) -> None:
        for name in [n for n in stored if n.endswith("scale")]:
            wide = stored[name].bfloat16()
            stored[name] = wide.reshape(()) if name.endswith("input_scale") else wide

    source = changed(made(tmp_path / "in", SCHEMES["fp8-static"]), respelled)
    convert(source, tmp_path / "out", "compressed-tensors")
    assert torch.equal(logits(source), logits(tmp_path / "out"))
    scale = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.down_proj.input_scale"]
    assert (scale.dtype, scale.shape) == (torch.float32, (1,))


def test_one_scale_becomes_one_a_row_where_the_format_has_no_other(tmp_path: Path) -> None:
    source = made(tmp_path / "in", replace(SCHEMES["w4-tensor"], symmetric=True))
    assert convert(source, tmp_path / "out", "gptq").packed == 21
    assert torch.equal(logits(source), logits(tmp_path / "out"))


@pytest.mark.parametrize("target", ["awq", "gptq", "gptq_v2"])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("w8a8", "rounded inputs need compressed-tensors"),
        ("w8a8-static", "rounded inputs need compressed-tensors"),
        ("fp8-static", "8-bit floats need compressed-tensors"),
        ("fp8-weights", "8-bit floats need compressed-tensors"),
    ],
)
def test_formats_of_levels_refuse_and_say_what_would_work(
    tmp_path: Path, name: str, target: Any, says: str
) -> None:
    source = made(tmp_path / "in", SCHEMES[name])
    with pytest.raises(ModelError, match=rf"layers\.0\.self_attn\.q_proj: .*{says}") as caught:
        convert(source, tmp_path / "out", target)
    assert "\n" not in str(caught.value)
    expected = f"--format compressed-tensors, or quantize the original model with --format {target}"
    assert caught.value.hint == expected
    assert {f.name for f in tmp_path.iterdir()} == {"plain", "in"}


def asymmetric(config: dict[str, Any], stored: dict[str, Tensor]) -> None:
    config["config_groups"]["group_0"]["input_activations"]["symmetric"] = False


def four_bits_of_input(config: dict[str, Any], stored: dict[str, Tensor]) -> None:
    config["config_groups"]["group_0"]["input_activations"]["num_bits"] = 4


def floats(config: dict[str, Any], stored: dict[str, Tensor]) -> None:
    config["config_groups"]["group_0"]["input_activations"]["type"] = "float"


def in_blocks(rows: int, columns: int) -> Change:
    """FP8_BLOCK, as other programs write it."""

    def change(config: dict[str, Any], stored: dict[str, Tensor]) -> None:
        group, generator = config["config_groups"]["group_0"], torch.Generator().manual_seed(1)
        group["weights"] |= {"strategy": "block", "block_structure": [rows, columns]}
        group["input_activations"] |= {"strategy": "group", "group_size": columns}
        for name in [n for n in stored if n.endswith("weight_scale")]:
            shape = stored[name.removesuffix("_scale")].shape
            blocks = -(-shape[0] // rows), -(-shape[1] // columns)
            stored[name] = torch.rand(blocks, generator=generator).bfloat16()

    return change


@pytest.mark.parametrize("size", [16, 40], ids=["whole", "short at the ends"])
def test_blocks_are_written_again(tmp_path: Path, size: int) -> None:
    source = changed(made(tmp_path / "in", SCHEMES["fp8"]), in_blocks(size, size))
    (source / "quant_report.json").unlink()  # other programs write none
    assert convert(source, tmp_path / "out", "compressed-tensors").packed == 21
    assert torch.equal(logits(source), logits(tmp_path / "out"))
    assert settings(source) == settings(tmp_path / "out")
    assert verify(tmp_path / "out").problems == []


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("w8a8", asymmetric, "its inputs are to be rounded with zero points"),
        ("w8a8", four_bits_of_input, "to other than 8 bits"),
        ("w8a8", floats, "its inputs are rounded to 8-bit floats, and its weights are ints"),
        ("fp8", in_blocks(16, 32), "its floats share scales in blocks that are no squares"),
    ],
    ids=["zero points", "4 bits", "another kind", "blocks"],
)
def test_what_no_form_says_stays_as_it_is(tmp_path: Path, name: str, change: Change, says: str) -> None:
    source = changed(made(tmp_path / "in", SCHEMES[name]), change)
    with pytest.raises(ModelError, match=rf"layers\.0\.self_attn\.q_proj: .*{says}") as caught:
        convert(source, tmp_path / "out", "compressed-tensors")
    assert caught.value.hint == "keep the checkpoint as it is"
    assert {f.name for f in tmp_path.iterdir()} == {"plain", "in"}


def with_head(config: dict[str, Any], stored: dict[str, Tensor]) -> None:
    """The head as 8-bit floats too."""
    head = stored["lm_head.weight"].float()
    scale = head.abs().amax(1, keepdim=True) / 448
    stored |= {"lm_head.weight_scale": scale, "lm_head.weight": (head / scale).to(torch.float8_e4m3fn)}
    config["ignore"] = []


def with_head_only(config: dict[str, Any], stored: dict[str, Tensor]) -> None:
    for name in [n for n in stored if n.endswith("weight_scale")]:
        weight = name.removesuffix("_scale")
        stored[weight] = stored[weight].float() * stored.pop(name)
    with_head(config, stored)


def test_a_head_that_rounds_its_inputs_stays(tmp_path: Path) -> None:
    source = changed(made(tmp_path / "in", SCHEMES["fp8"], tie_word_embeddings=False), with_head)
    assert convert(source, tmp_path / "out", "compressed-tensors").packed == 22
    assert torch.equal(logits(source), logits(tmp_path / "out"))


def test_a_head_that_rounds_its_inputs_does_not_become_floats(tmp_path: Path) -> None:
    """Those would be multiplied by inputs as they are."""
    source = changed(made(tmp_path / "in", SCHEMES["fp8"], tie_word_embeddings=False), with_head_only)
    with pytest.raises(ModelError, match="lm_head: 8-bit floats need compressed-tensors"):
        convert(source, tmp_path / "out", "awq")


def test_a_float_that_changed_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made(tmp_path / "in", SCHEMES["fp8"])
    encode = FloatQuantizedCodec.encode

    def careless(self: FloatQuantizedCodec, weight: Any) -> dict[str, Tensor]:
        stored = encode(self, weight)
        return stored | {"weight_scale": stored["weight_scale"] * 2}

    monkeypatch.setattr(FloatQuantizedCodec, "encode", careless)
    with pytest.raises(ModelError, match="q_proj would not hold the same values"):
        convert(source, tmp_path / "out", "compressed-tensors")


def test_a_scale_of_inputs_that_changed_would_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made(tmp_path / "in", SCHEMES["w8a8-static"])
    encode = Container.encode

    def careless(self: Container, linear: Linear, form: Any) -> dict[str, Tensor]:
        stored = encode(self, linear, form)
        return stored | {"input_scale": stored["input_scale"] * 2}

    monkeypatch.setattr(Container, "encode", careless)
    with pytest.raises(ModelError, match="q_proj would not round its inputs alike"):
        convert(source, tmp_path / "out", "compressed-tensors")


def test_what_is_not_carried_over_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def loosened(config: dict[str, Any], stored: dict[str, Tensor]) -> None:
        config["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "dynamic": False}
        config["config_groups"]["group_0"]["input_activations"]["strategy"] = "tensor"

    source = changed(made(tmp_path / "in", SCHEMES["fp8"]), loosened)
    with caplog.at_level(logging.WARNING, "nybble.convert"):
        convert(source, tmp_path / "out", "compressed-tensors")
    assert "the cache of keys and values is not carried over" in caplog.text
    assert "a scale a token, which is finer" in caplog.text
