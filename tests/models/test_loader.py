"""Reading checkpoints: what is whole loads, what is not says which file and which tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nybble_models.checkpoint import Checkpoint, read_config
from nybble_models.errors import BrokenCheckpoint, UnsupportedModel
from nybble_models.formats.awq import AwqCodec
from nybble_models.loader import Loader
from support_checkpoint import write_checkpoint
from support_quantized import uniform
from support_tiny import CONFIGS, round_to_nearest

CONFIG = CONFIGS["llama"] | {"architectures": ["LlamaForCausalLM"]}


def tensors() -> dict[str, torch.Tensor]:
    """A llama checkpoint by its names on disk."""
    made = {"model.embed_tokens.weight": torch.randn(97, 64), "model.norm.weight": torch.ones(64)}
    for i in range(3):
        layer = f"model.layers.{i}"
        shapes = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64)}
        made |= {f"{layer}.self_attn.{p}_proj.weight": torch.randn(*s) for p, s in shapes.items()}
        shapes = {"gate": (96, 64), "up": (96, 64), "down": (64, 96)}
        made |= {f"{layer}.mlp.{p}_proj.weight": torch.randn(*s) for p, s in shapes.items()}
        made |= {f"{layer}.{n}_layernorm.weight": torch.ones(64) for n in ("input", "post_attention")}
    return made


def write(directory: Path, stored: dict[str, torch.Tensor], **config: object) -> Path:
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(stored, directory / "model.safetensors")
    return directory


def load(directory: Path) -> None:
    Loader(Checkpoint(directory)).load()


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_all_of_it_lies_on_the_device_that_is_named(tmp_path: Path, family: str, floats: bool) -> None:
    loader = Loader(
        Checkpoint(write_checkpoint(tmp_path, family)), floats=floats, device=torch.device("meta")
    )
    held = list(loader.load().tensors())
    assert len(held) > 20 and {weight.device.type for _, weight in held} == {"meta"}


def test_a_whole_checkpoint_loads(tmp_path: Path) -> None:
    stored = tensors()
    weights = Loader(Checkpoint(write(tmp_path, stored))).load()
    assert torch.equal(
        weights.blocks[2].linears["down"].weight, stored["model.layers.2.mlp.down_proj.weight"]
    )
    assert weights.head is None


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    stored = tensors()
    names = sorted(stored)
    files = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for file, part in files.items():
        save_file({n: stored[n] for n in part}, tmp_path / file)
    listing = {n: file for file, part in files.items() for n in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listing}))
    load(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(BrokenCheckpoint, match=r"b\.safetensors is missing"):
        load(tmp_path)


@pytest.mark.parametrize("bad", ["../evil.safetensors", "/etc/passwd"])
def test_an_index_cannot_point_outside(tmp_path: Path, bad: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": bad}}))
    with pytest.raises(BrokenCheckpoint, match="outside the folder"):
        load(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>" * 9]
)
def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors is not a whole safetensors file"):
        load(tmp_path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, tensors()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BrokenCheckpoint, match="not a whole safetensors file"):
        load(tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    stored = tensors()
    del stored["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(BrokenCheckpoint, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(write(tmp_path, stored))


def test_a_wrong_shape_says_expected_and_found(tmp_path: Path) -> None:
    stored = tensors() | {"model.layers.0.self_attn.q_proj.weight": torch.randn(64, 63)}
    with pytest.raises(BrokenCheckpoint, match=r"q_proj\.weight: expected \[64, 64\], found \[64, 63\]"):
        load(write(tmp_path, stored))


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": NaN', "\udce9"], ids=repr)
def test_a_config_that_is_no_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf8", "surrogateescape"))
    with pytest.raises(BrokenCheckpoint, match=r"config\.json"):
        Checkpoint(tmp_path)


def quantized_tensors() -> dict[str, torch.Tensor]:
    stored = tensors()
    codec = AwqCodec()
    for name in [n for n in stored if "_proj" in n]:
        encoded = codec.encode(round_to_nearest(stored.pop(name)))
        stored |= {name.replace("weight", part): t.contiguous() for part, t in encoded.items()}
    return stored


AWQ = AwqCodec().settings(uniform(4, 32))


def test_quantized_linears_go_through_their_codec(tmp_path: Path) -> None:
    stored = quantized_tensors()
    weights = Loader(Checkpoint(write(tmp_path, stored, quantization_config=AWQ))).load()
    assert weights.blocks[0].linears["q"].weight.shape == (64, 64)
    assert weights.nbytes()["linear"] < 3 * 36864 * 0.7


def test_nan_scales_are_caught(tmp_path: Path) -> None:
    stored = quantized_tensors()
    stored["model.layers.1.self_attn.v_proj.scales"][0, 0] = torch.nan
    with pytest.raises(BrokenCheckpoint, match=r"v_proj\.scales holds NaN"):
        load(write(tmp_path, stored, quantization_config=AWQ))


def test_tensors_that_do_not_belong_together_are_caught(tmp_path: Path) -> None:
    stored = quantized_tensors()
    stored["model.layers.1.self_attn.v_proj.scales"] = torch.ones(3, 32)
    with pytest.raises(BrokenCheckpoint, match="do not belong together"):
        load(write(tmp_path, stored, quantization_config=AWQ))


def test_an_unknown_method_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="hqq"):
        load(write(tmp_path, tensors(), quantization_config={"quant_method": "hqq"}))


@pytest.mark.parametrize(
    ("name", "said", "method"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": False}, "gptq"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128, "zero_point": True}, "awq"),
    ],
    ids=["AutoGPTQ", "AutoAWQ"],
)
def test_settings_in_a_file_of_their_own_are_found(
    tmp_path: Path, name: str, said: dict[str, object], method: str
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / name).write_text(json.dumps(said))
    found = read_config(tmp_path)["quantization_config"]
    assert (found["quant_method"], found["bits"], found["group_size"]) == (method, 4, 128)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "other"}}')
    assert read_config(tmp_path)["quantization_config"] == {"quant_method": "other"}


def test_a_single_shard_may_have_any_name(tmp_path: Path) -> None:
    """AutoGPTQ wrote gptq_model-4bit-128g.safetensors; two such files say nothing without an index."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, tmp_path / "gptq_model-4bit-128g.safetensors")
    assert torch.equal(Checkpoint(tmp_path).tensor("a"), torch.ones(2))
    save_file({"b": torch.ones(2)}, tmp_path / "another.safetensors")
    with pytest.raises(BrokenCheckpoint, match=r"no model\.safetensors"):
        Checkpoint(tmp_path)
