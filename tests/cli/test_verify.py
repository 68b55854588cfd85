"""`nybble verify` tells a whole checkpoint from a damaged one, and says what it could not check."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nybble import cli
from nybble_kernels.quantized import QuantizedTensor
from nybble_models.formats.compressed_tensors import IntQuantizedCodec
from nybble_quantizers import sums
from support_checkpoint import write_checkpoint
from support_papers import with_papers

WEIGHTS = "model.safetensors"
LINEAR = "model.layers.1.mlp.down_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return with_papers(tmp_path)[0]


def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Exit code, and every line but those of what holds."""
    code = cli.main(["verify", str(folder)])
    out, err = capsys.readouterr()
    assert err == ""
    return code, [line for line in out.splitlines() if not line.startswith("ok: ")]


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    sums.write(folder)


def change_json(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    said = json.loads((folder / name).read_text())
    change(said)
    (folder / name).write_text(json.dumps(said))
    sums.write(folder)


def row(report: dict[str, Any], name: str = LINEAR) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in report["layers"] if each["name"] == name)
    return found


def test_a_whole_checkpoint_is_said_to_be_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = sum(path.is_file() for path in folder.iterdir()) - 1
    assert lines[0] == f"ok: {files} files match SHA256SUMS"
    assert lines[1].startswith("ok: 21 quantized linears decode (21 of 4 bits in groups of 32), ")
    assert lines[2] == "ok: config.json: llama, 3 layers, and their tensors are there"
    assert lines[3].startswith("ok: quant_report.json: 21 linears and ")
    assert len(lines) == 4


@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param({"format": "gptq", "symmetric": True}, id="gptq"),
        pytest.param({"format": "gptq_v2", "bits": 3}, id="gptq-v2"),
        pytest.param({"format": "compressed-tensors", "group_size": -1}, id="compressed-tensors"),
        pytest.param({"format": "compressed-tensors", "overrides": ("*.down_proj=8",)}, id="two widths"),
        pytest.param({"group_size": 0}, id="one scale"),
        pytest.param({"bits": 3, "group_size": 0, "symmetric": True}, id="one scale, symmetric"),
        pytest.param({"ends": True}, id="embedding"),
        pytest.param(
            {"bits": 8, "group_size": -1, "symmetric": True, "ends": True}, id="embedding like the linears"
        ),
        pytest.param({"skip": ("*.o_proj",)}, id="skipped"),
        pytest.param({"method": "none"}, id="16 bits"),
    ],
)
def test_every_format_is_read(
    tmp_path: Path, scheme: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = with_papers(tmp_path, scheme=scheme)
    assert run(out, capsys) == (0, [])


@pytest.mark.parametrize("name", [WEIGHTS, "README.md", "tokenizer.json", "quant_errors.svg"])
def test_a_flipped_bit_is_found(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-9] ^= 1
    (folder / name).write_bytes(data)
    code, lines = run(folder, capsys)
    assert code == 1
    assert f"problem: {name} is not the file that SHA256SUMS lists: its sum differs" in lines


def test_missing_and_added_files_are_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "extra.bin").write_bytes(b"x")
    assert run(folder, capsys) == (
        1,
        [
            "problem: tokenizer.json is missing; SHA256SUMS lists it",
            "problem: extra.bin is not listed in SHA256SUMS",
        ],
    )


def test_our_own_folder_must_have_sums(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / sums.FILE).unlink()
    assert run(folder, capsys) == (1, ["problem: SHA256SUMS is missing"])


@pytest.mark.parametrize(
    ("tensor", "value", "problem"),
    [
        pytest.param(
            f"{LINEAR}.scales", float("nan"), f"{LINEAR}: its scales hold NaN or infinity", id="scale"
        ),
        pytest.param("model.norm.weight", float("inf"), "model.norm.weight holds NaN or infinity", id="norm"),
    ],
)
def test_numbers_that_are_none_are_found(
    folder: Path, tensor: str, value: float, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change_tensors(folder, lambda tensors: tensors[tensor].view(-1)[:1].fill_(value))
    assert run(folder, capsys) == (1, [f"problem: {problem}"])


@pytest.mark.parametrize(
    ("gone", "problems"),
    [
        pytest.param("model.layers.0.input_layernorm.weight", 2, id="norm"),
        pytest.param(f"{LINEAR}.qzeros", 1, id="part of a linear"),
        pytest.param("model.embed_tokens.weight", 2, id="embedding"),
    ],
)
def test_missing_tensors_are_found(
    folder: Path, gone: str, problems: int, capsys: pytest.CaptureFixture[str]
) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(gone))
    code, lines = run(folder, capsys)
    assert code == 1
    assert len(lines) == problems  # the bytes differ too where all else can be read
    assert gone.rpartition(".")[0] in lines[0]


def test_a_cut_file_is_one_problem_of_its_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    code, lines = run(folder, capsys)
    assert code == 1
    assert len(lines) == 2
    assert "is not a whole safetensors file" in lines[1]


def test_a_missing_shard_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listing = dict.fromkeys(load_file(folder / WEIGHTS), WEIGHTS) | {
        f"model.layers.2.mlp.{p}_proj.{part}": "model-2.safetensors"
        for p in ("gate", "up", "down")
        for part in ("qweight", "qzeros", "scales")
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listing}))
    sums.write(folder)
    code, lines = run(folder, capsys)
    assert code == 1
    assert [line.count("model-2.safetensors is missing") for line in lines] == [1]


@pytest.mark.parametrize(
    ("lie", "problem"),
    [
        pytest.param(lambda r: row(r).update(bits=3), f"{LINEAR}: bits 3, found 4", id="bits"),
        pytest.param(
            lambda r: row(r).update(group_size=64), f"{LINEAR}: group size 64, found 32", id="group"
        ),
        pytest.param(lambda r: row(r).update(bytes=5), f"{LINEAR}: bytes 5, found 3", id="bytes"),
        pytest.param(
            lambda r: r["layers"].remove(row(r)), f"{LINEAR} is quantized and not listed", id="gone"
        ),
        pytest.param(lambda r: row(r).update(name="x"), "x is not quantized", id="renamed"),
        pytest.param(
            lambda r: r["skipped"].append(LINEAR), f"{LINEAR} is skipped and quantized", id="skipped"
        ),
        pytest.param(lambda r: r["bytes"].update(linear=0), "bytes of tensors, found ", id="total"),
    ],
)
def test_a_report_that_lies_is_found(
    folder: Path, lie: Callable[[dict[str, Any]], object], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change_json(folder, "quant_report.json", lie)
    code, lines = run(folder, capsys)
    assert code == 1
    assert lines[0].startswith("problem: quant_report.json lies: ")
    assert problem in lines[0]


@pytest.mark.parametrize("name", ["config.json", "quant_report.json"])
@pytest.mark.parametrize("text", ["{", "[]"], ids=["cut", "list"])
def test_json_that_is_none_is_found(
    folder: Path, name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name).write_text(text)
    sums.write(folder)
    code, lines = run(folder, capsys)
    assert code == 1
    assert len(lines) == 1
    assert name in lines[0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        pytest.param({"bits": 8}, "AWQ with bits=8", id="another width"),
        pytest.param({"quant_method": "none such"}, "'none such' is not one that nybble reads", id="unknown"),
        pytest.param({"quant_method": "gptq"}, "do not belong together", id="another method"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_found(
    folder: Path, change: dict[str, Any], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change_json(folder, "config.json", lambda config: config["quantization_config"].update(change))
    code, lines = run(folder, capsys)
    assert code == 1
    assert any(problem in line for line in lines)


def test_another_model_s_config_is_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_json(folder, "config.json", lambda config: config.update(num_hidden_layers=4, vocab_size=300))
    code, lines = run(folder, capsys)
    assert code == 1
    assert "problem: model.embed_tokens.weight is [264, 64]; config.json asks for [300, 64]" in lines
    assert "problem: model.layers.3.mlp.up_proj.weight [96, 64] is missing; config.json asks for it" in lines


def test_another_tool_s_checkpoint_is_checked_as_far_as_it_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path)
    code, lines = run(tmp_path, capsys)
    assert code == 0
    assert [line.split(":")[:2] for line in lines] == [
        ["unknown", " no SHA256SUMS"],
        ["unknown", " no quant_report.json"],
    ]
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[f"{LINEAR}.scales"][0, 0] = float("inf")
    save_file(tensors, tmp_path / WEIGHTS)
    assert run(tmp_path, capsys)[0] == 1


def test_a_family_that_is_not_known_has_its_tensors_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["NoneSuchForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, lines = run(tmp_path, capsys)
    assert code == 0
    assert "whether tensors are missing cannot be told" in lines[-1]


def test_zeros_out_of_range_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = QuantizedTensor(
        torch.full((8, 32), 3, dtype=torch.uint8),
        torch.ones(8, 1),
        4,
        32,
        torch.full((8, 1), 5, dtype=torch.uint8),
    )
    tensors = {f"{LINEAR}.{part}": tensor for part, tensor in IntQuantizedCodec().encode(weight).items()}
    tensors[f"{LINEAR}.weight_zero_point"].fill_(100)
    save_file(tensors, tmp_path / WEIGHTS)
    rule = {"num_bits": 4, "symmetric": False, "group_size": 32, "type": "int"}
    settings = {
        "quant_method": "compressed-tensors",
        "config_groups": {"g": {"targets": ["Linear"], "weights": rule}},
    }
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    code, lines = run(tmp_path, capsys)
    assert code == 1
    assert f"problem: {LINEAR}: its codes or zeros are not 4-bit" in lines


def test_floats_of_8_bits_are_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = torch.ones(8, 32).to(torch.float8_e4m3fn)
    tensors = {
        f"{LINEAR}.weight": values,
        f"{LINEAR}.weight_scale": torch.ones(8, 1),
        "x.weight": values.clone(),
    }
    rule = {"num_bits": 8, "symmetric": True, "strategy": "channel", "type": "float"}
    settings = {
        "quant_method": "compressed-tensors",
        "config_groups": {"g": {"targets": ["Linear"], "weights": rule}},
    }
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    save_file(tensors, tmp_path / WEIGHTS)
    assert run(tmp_path, capsys)[0] == 0
    for damaged in (f"{LINEAR}.weight", "x.weight"):
        broken = tensors[damaged].view(torch.uint8).clone()
        broken[0, 0] = 0x7F
        save_file(tensors | {damaged: broken.view(torch.float8_e4m3fn)}, tmp_path / WEIGHTS)
        code, lines = run(tmp_path, capsys)
        assert code == 1
        assert any(damaged.removesuffix(".weight") in line and "NaN" in line for line in lines)


@pytest.mark.parametrize("gone", [True, False], ids=["missing", "zero"])
def test_a_scale_of_inputs_that_is_none_is_found(
    tmp_path: Path, gone: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    scheme = {"bits": 8, "group_size": -1, "symmetric": True, "inputs": "tensor"}
    out, _ = with_papers(tmp_path, scheme=scheme)
    assert run(out, capsys) == (0, [])
    name = f"{LINEAR}.input_scale"
    change_tensors(out, lambda tensors: tensors.pop(name) if gone else tensors[name].zero_())
    code, lines = run(out, capsys)
    assert code == 1
    assert lines[0].startswith(f"problem: {LINEAR}: input_scale is not one positive number")


@pytest.mark.parametrize("name", ["none", "file"])
def test_what_is_no_folder_is_a_mistake_of_the_caller(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["verify", str(tmp_path / name)]) == 2
    assert "not a folder" in capsys.readouterr().err
