from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nybble_kernels.quantized import QuantizedTensor
from nybble_models.checkpoint import Checkpoint
from nybble_models.decoder import Decoder
from nybble_models.errors import BrokenCheckpoint, ModelError
from nybble_models.formats.form import Form
from nybble_models.loader import Loader
from nybble_quantizers import journal, output
from nybble_quantizers.pipeline import quantize
from nybble_quantizers.report import QuantizeProgress
from nybble_quantizers.scheme import Scheme
from support_checkpoint import write_checkpoint
from support_gguf import write_gguf
from support_tiny import tiny_spec, tiny_weights

AWQ = Scheme(group_size=32, samples=4, length=24, grid=8)
RTN = replace(AWQ, method="rtn")
TOKENS = torch.randint(200, (30,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return plain(tmp_path / "plain")


def plain(folder: Path, family: str = "llama") -> Path:
    folder.mkdir()
    return write_checkpoint(folder, family, group_size=None)


def logits(folder: Path) -> torch.Tensor:
    loader = Loader(Checkpoint(folder))
    return Decoder(loader.spec, loader.load()).forward(TOKENS)


def distance(folder: Path, source: Path) -> float:
    expected = logits(source)
    return float((logits(folder) - expected).square().mean() / expected.square().mean())


@pytest.mark.parametrize("method", ["awq", "rtn"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "opt"])
def test_a_quantized_model_loads_and_computes_nearly_the_same(
    tmp_path: Path, family: str, method: str
) -> None:
    source, out = plain(tmp_path / "plain", family), tmp_path / "out"
    report = quantize(source, out, replace(AWQ, method=method))
    loader = Loader(Checkpoint(out))
    weights = loader.load()
    linears = [linear.weight for block in weights.blocks for linear in block.linears.values()]
    assert all(isinstance(weight, QuantizedTensor) for weight in linears)
    assert distance(out, source) < 0.4
    assert len(report.layers) == len(linears)
    assert report.skipped == ()


def test_other_programs_find_what_they_expect(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    quantize(source, out, AWQ)
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == "float16"
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "sym": False,
        "desc_act": False,
        "modules_to_not_convert": None,
    }
    tensors = load_file(out / "model.safetensors")
    linear = "model.layers.0.mlp.down_proj"
    assert {name for name in tensors if name.startswith(linear)} == {
        f"{linear}.qweight",
        f"{linear}.qzeros",
        f"{linear}.scales",
    }
    assert tensors["model.embed_tokens.weight"].dtype == torch.float16
    assert "lm_head.weight" not in tensors  # tied
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert {f.stat().st_mode & 0o777 for f in out.iterdir()} == {0o644}


def test_the_report_says_what_was_done(tmp_path: Path, source: Path) -> None:
    quantize(source, tmp_path / "out", AWQ, seed=5, command="nybble quantize")
    report = json.loads((tmp_path / "out" / "quant_report.json").read_text())
    assert report["command"] == "nybble quantize"
    assert report["seed"] == 5
    assert report["scheme"]["group_size"] == 32
    assert report["calibration"]["origin"] == "written by the model"
    assert {"torch", "safetensors"} <= set(report["versions"])
    down = next(row for row in report["layers"] if row["name"] == "model.layers.2.mlp.down_proj")
    assert down["bits"] == 4
    assert down["output_sqnr_db"] > 10
    assert 0 < down["weight_error"] < 0.2
    assert 0 <= down["clip_share"] <= 1
    stored = sum(t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values())
    assert sum(report["bytes"].values()) == stored


def test_the_same_seed_makes_the_same_bytes(tmp_path: Path, source: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        quantize(source, tmp_path / name, AWQ, seed=seed, command="")
    a, b, c = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in "abc")
    assert a == b
    assert a["model.safetensors"] != c["model.safetensors"]


def test_the_number_of_threads_changes_no_byte(tmp_path: Path, source: Path) -> None:
    before = torch.get_num_threads()
    scheme = replace(AWQ, samples=17, length=12)  # three parts are written side by side
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            quantize(source, tmp_path / str(threads), scheme, command="")
    finally:
        torch.set_num_threads(before)
    one, three = ((tmp_path / name / "model.safetensors").read_bytes() for name in "13")
    assert one == three


def test_calibration_text_decides_instead_of_the_seed(tmp_path: Path, source: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    report = quantize(source, tmp_path / "out", AWQ, calibration=str(text))
    assert report.calibration is not None
    assert report.calibration["origin"] == "text.txt"
    assert report.calibration["samples"] == 4


def test_a_gguf_file_becomes_a_folder(tmp_path: Path) -> None:
    spec = tiny_spec("llama")
    path = write_gguf(tmp_path / "m.gguf", "llama", spec, tiny_weights(spec, group_size=None), tokens=97)
    quantize(path, tmp_path / "out", RTN)
    assert Loader(Checkpoint(tmp_path / "out")).spec == spec
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names


@pytest.mark.parametrize(
    "changes",
    [{"symmetric": True}, {"group_size": -1}, {"clip": False}],
    ids=["symmetric", "rows", "no clip"],
)
def test_the_scheme_is_what_is_read_back(tmp_path: Path, source: Path, changes: dict[str, Any]) -> None:
    scheme = replace(AWQ, **changes)
    report = quantize(source, tmp_path / "out", scheme)
    for linear in Loader(Checkpoint(tmp_path / "out")).block(1).linears.values():
        assert isinstance(linear.weight, QuantizedTensor)
        assert linear.weight.symmetric == scheme.symmetric
        assert linear.weight.group_size == Form(4, scheme.group_size).group(linear.weight.in_features)
    assert any(layer.clip_share for layer in report.layers) == scheme.clip
    assert distance(tmp_path / "out", source) < 0.6


def test_method_none_only_changes_the_container(tmp_path: Path, source: Path) -> None:
    report = quantize(source, tmp_path / "out", Scheme(method="none"))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert distance(tmp_path / "out", source) < 1e-5
    assert report.layers == ()


def test_what_the_format_cannot_hold_stays_16_bit(
    tmp_path: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """96 inputs are no multiple of 64, so the down projections stay as they are, and the log says so."""
    with caplog.at_level(logging.WARNING, "nybble.quantize"):
        report = quantize(source, tmp_path / "out", replace(RTN, group_size=64))
    downs = tuple(f"model.layers.{i}.mlp.down_proj" for i in range(3))
    assert report.skipped == downs
    assert "3 linears stay at 16 bits" in caplog.text
    assert "96 inputs are not a multiple of the group size 64 (--format gptq_v2 holds it)" in caplog.text
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"] == list(downs)
    block = Loader(Checkpoint(tmp_path / "out")).block(0)
    assert isinstance(block.linears["down"].weight, torch.Tensor)
    assert isinstance(block.linears["up"].weight, QuantizedTensor)


def test_partners_that_engines_fuse_stay_together(tmp_path: Path, source: Path) -> None:
    report = quantize(source, tmp_path / "out", replace(AWQ, skip=("*.1.self_attn.k_proj",)))
    assert report.skipped == tuple(f"model.layers.1.self_attn.{p}_proj" for p in "qkv")
    assert distance(tmp_path / "out", source) < 0.4


def test_shards_are_indexed(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output.ShardWriter.__init__, "__defaults__", (40_000,))
    quantize(source, tmp_path / "sharded", RTN)
    monkeypatch.undo()
    quantize(source, tmp_path / "single", RTN)
    shards = sorted(f.name for f in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert torch.equal(logits(tmp_path / "sharded"), logits(tmp_path / "single"))


def test_progress_is_told_in_order(tmp_path: Path, source: Path) -> None:
    events: list[QuantizeProgress] = []
    quantize(source, tmp_path / "out", AWQ, progress=events.append)
    stages = [event.stage for event in events]
    assert stages == sorted(stages)  # calibrate, quantize, write
    blocks = [event for event in events if event.stage == "quantize"]
    assert [event.done for event in blocks] == [1, 2, 3]
    assert blocks[-1].seconds_left == 0
    assert all(len(event.layers) == 7 and event.layers[0].output_sqnr_db for event in blocks)
    assert all(event.done <= event.total for event in events)


def damage(source: Path, name: str, value: float) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, source / "model.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.2.input_layernorm.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_nan_is_named_and_leaves_nothing(tmp_path: Path, source: Path, name: str) -> None:
    damage(source, name, float("nan"))
    with pytest.raises(BrokenCheckpoint) as caught:
        quantize(source, tmp_path / "out", RTN)
    assert name.removesuffix(".weight") in str(caught.value)
    assert {f.name for f in tmp_path.iterdir()} == {"plain"}


@pytest.mark.parametrize(
    ("method", "part"),
    [("rtn", "model.layers.1.mlp.up_proj: "), ("awq", "layer 1: "), ("gptq", "layer 1: ")],
)
def test_a_number_past_float16_is_placed_and_leaves_nothing(
    tmp_path: Path, source: Path, method: str, part: str
) -> None:
    damage(source, "model.layers.1.mlp.up_proj.weight", 1e20)
    with pytest.raises(BrokenCheckpoint, match="too large") as caught:
        quantize(source, tmp_path / "out", replace(AWQ, method=method))
    assert str(caught.value).startswith(part) and caught.value.hint
    assert {f.name for f in tmp_path.iterdir()} == {"plain"}


def test_an_embedding_too_large_is_named_and_leaves_nothing(tmp_path: Path, source: Path) -> None:
    damage(source, "model.embed_tokens.weight", 1e9)
    with pytest.raises(BrokenCheckpoint, match=r"model\.embed_tokens: a weight is too large") as caught:
        quantize(source, tmp_path / "out", replace(RTN, ends=True))
    assert caught.value.hint
    assert {f.name for f in tmp_path.iterdir()} == {"plain"}


def test_an_output_that_exists_is_left_alone(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="exists already"):
        quantize(source, tmp_path / "out", RTN)
    assert list((tmp_path / "out").iterdir()) == []


def test_quantizing_twice_is_refused(tmp_path: Path, source: Path) -> None:
    quantize(source, tmp_path / "once", RTN)
    with pytest.raises(ModelError, match="quantized already"):
        quantize(tmp_path / "once", tmp_path / "twice", RTN)


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (replace(RTN, bits=3, format="awq"), "4-bit"),
        (replace(RTN, group_size=60), "group size"),
        (replace(RTN, skip=("*",)), "skip"),
    ],
    ids=["bits", "group", "all skipped"],
)
def test_a_scheme_that_changes_nothing_is_refused(
    tmp_path: Path, source: Path, scheme: Scheme, reason: str
) -> None:
    with pytest.raises(ModelError, match=reason):
        quantize(source, tmp_path / "out", scheme)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_seen_before_the_work(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: output.shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ModelError, match="MiB are needed"):
        quantize(source, tmp_path / "out", RTN)


@pytest.mark.parametrize("where", [journal, output], ids=["a block", "a shard"])
def test_a_write_that_fails_leaves_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, where: ModuleType
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(where, "save_file", broken)
    with pytest.raises(ModelError, match="Input/output error"):
        quantize(source, tmp_path / "out", RTN)
    assert {f.name for f in tmp_path.iterdir()} == {"plain"}


def test_only_one_block_is_held(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a calibration text no block is read twice, nor before its turn."""
    read: list[int] = []
    block = Loader.block
    monkeypatch.setattr(Loader, "block", lambda self, layer: read.append(layer) or block(self, layer))
    done: list[int] = []
    text = tmp_path / "text.txt"
    text.write_text("abc " * 200)

    def listen(event: QuantizeProgress) -> None:
        if event.stage == "quantize":
            done.append(len(read))

    quantize(source, tmp_path / "out", AWQ, calibration=str(text), progress=listen)
    assert read == [0, 1, 2]
    assert done == [1, 2, 3]


def test_the_source_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a folder nor"):
        quantize(tmp_path / "nothing", tmp_path / "out", RTN)
