"""Forms by pattern and by measurement, from the scheme to the served file."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nybble_kernels.quantized import QuantizedTensor
from nybble_models.checkpoint import Checkpoint
from nybble_models.decoder import Decoder
from nybble_models.errors import ModelError
from nybble_models.loader import Loader
from nybble_quantizers.pipeline import foresee, quantize
from nybble_quantizers.report import QuantizeProgress
from nybble_quantizers.scheme import Scheme, preset
from nybble_quantizers.verify import verify
from support_checkpoint import write_checkpoint

RTN = Scheme(method="rtn", group_size=32, samples=4, length=24, grid=8)
TOKENS = torch.randint(200, (30,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "plain"
    folder.mkdir()
    return write_checkpoint(folder, group_size=None)


def bits_of(folder: Path) -> dict[str, int]:
    """Of every linear; 16 where it is not rounded."""
    loader = Loader(Checkpoint(folder))
    found = {}
    for layer in range(loader.spec.num_layers):
        for projection, linear in loader.block(layer).linears.items():
            weight = linear.weight
            found[f"{layer}.{projection}"] = weight.bits if isinstance(weight, QuantizedTensor) else 16
    return found


def distance(folder: Path, source: Path) -> float:
    made, meant = (
        Decoder(loader.spec, loader.load()).forward(TOKENS)
        for loader in (Loader(Checkpoint(folder)), Loader(Checkpoint(source)))
    )
    return float((made - meant).square().mean() / meant.square().mean())


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq_v2"])
@pytest.mark.parametrize("method", ["rtn", "awq", "awq+gptq"])
def test_overrides_are_what_is_read_back(tmp_path: Path, source: Path, method: str, format: str) -> None:
    overrides = ("*.down_proj=8", "model.layers.1.*=16", "*.layers.2.self_attn.o_proj=3")
    quantize(source, tmp_path / "out", replace(RTN, method=method, overrides=overrides, format=format))
    found = bits_of(tmp_path / "out")
    assert [found[f"{i}.down"] for i in range(3)] == [8, 16, 8]
    assert {found[f"1.{p}"] for p in ("q", "k", "v", "o", "gate", "up")} == {16}
    assert (found["2.o"], found["0.o"], found["0.q"]) == (3, 4, 4)
    assert distance(tmp_path / "out", source) < 0.5


def test_a_target_of_bits_is_kept_and_better_than_one_width(tmp_path: Path, source: Path) -> None:
    scheme = replace(RTN, target_bits=5.6)
    report = quantize(source, tmp_path / "out", scheme)
    quantize(source, tmp_path / "four", replace(RTN, format="compressed-tensors"))
    stored = {row.name: row.bytes for row in report.layers}
    spec = Loader(Checkpoint(source)).spec
    weights = {p: spec.shape(p)[0] * spec.shape(p)[1] for p in spec.projections}
    left = (3 * len(spec.projections) - len(stored)) and sum(
        2 * weights[key.split(".")[1]] for key, bits in bits_of(tmp_path / "out").items() if bits == 16
    )
    assert 8 * (sum(stored.values()) + left) / (3 * sum(weights.values())) <= 5.6
    assert len(set(bits_of(tmp_path / "out").values())) > 1
    assert distance(tmp_path / "out", source) < distance(tmp_path / "four", source)


def test_partners_are_alike(tmp_path: Path, source: Path) -> None:
    quantize(source, tmp_path / "out", replace(RTN, target_bits=5.0))
    found = bits_of(tmp_path / "out")
    for layer in range(3):
        assert found[f"{layer}.q"] == found[f"{layer}.k"] == found[f"{layer}.v"]
        assert found[f"{layer}.gate"] == found[f"{layer}.up"]


def test_an_override_stands_beside_a_target(tmp_path: Path, source: Path) -> None:
    scheme = replace(RTN, target_bits=6.0, overrides=("model.layers.0.mlp.down_proj=3",))
    quantize(source, tmp_path / "out", scheme)
    assert bits_of(tmp_path / "out")["0.down"] == 3


def test_a_target_of_bytes(tmp_path: Path, source: Path) -> None:
    """Of all that is stored, what is not rounded included."""
    report = quantize(source, tmp_path / "out", replace(RTN, target_bytes=105_000))
    tensors = load_file(tmp_path / "out" / "model.safetensors").values()
    stored = sum(tensor.nbytes for tensor in tensors)
    assert stored == sum(report.bytes.values())
    assert 0.95 * 105_000 < stored <= 105_000
    smaller = quantize(source, tmp_path / "ends", replace(RTN, target_bytes=70_000, ends=True))
    assert 0.95 * 70_000 < sum(smaller.bytes.values()) <= 70_000
    for target, complaint in ((60_000, "the smallest forms take"), (6_000, "what is not rounded takes")):
        with pytest.raises(ModelError, match=complaint):
            quantize(source, tmp_path / "no", replace(RTN, target_bytes=target))
        assert not (tmp_path / "no").exists()


def test_a_choice_that_was_interrupted_is_not_made_again(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = replace(RTN, target_bits=5.0)

    def stop(event: QuantizeProgress) -> None:
        if event.stage == "quantize":
            raise KeyboardInterrupt

    quantize(source, tmp_path / "whole", scheme, command="")
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", scheme, command="", progress=stop)
    monkeypatch.setattr("nybble_quantizers.sensitivity.measure", None)
    quantize(source, tmp_path / "out", scheme, command="")
    whole, out = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("whole", "out"))
    assert whole == out


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
def test_embedding_and_head_are_rounded_on_request(tmp_path: Path, tied: bool) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    source = write_checkpoint(folder, group_size=None, tie_word_embeddings=tied)
    quantize(source, tmp_path / "out", replace(RTN, ends=True))
    loader = Loader(Checkpoint(tmp_path / "out"))
    embed, head = loader.embed(), loader.head()
    assert isinstance(embed, QuantizedTensor) and embed.bits == 8
    assert (head is None) == tied
    assert head is None or (isinstance(head.weight, QuantizedTensor) and head.weight.bits == 8)
    assert distance(tmp_path / "out", source) < 0.4


def test_a_target_may_include_the_ends(tmp_path: Path, source: Path) -> None:
    report = quantize(source, tmp_path / "out", replace(RTN, ends=True, target_bits=5.0))
    assert 8 * sum(report.bytes.values()) / Loader(Checkpoint(source)).spec.parameters < 5.6  # and norms


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"target_bits": 4.5, "target_bytes": 5}, "contradict"),
        ({"format": "awq", "target_bits": 4.5}, "one form"),
        ({"format": "awq", "overrides": ("*=8",)}, "one form"),
        ({"format": "gptq", "ends": True}, "no quantized embedding"),
    ],
    ids=["two targets", "awq target", "awq override", "gptq embedding"],
)
def test_contradictions_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        replace(RTN, **changes)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["W8A8", "W8A8-static", "FP8", "FP8-static"])
def test_ends_beside_rounded_inputs_read_floats(tmp_path: Path, source: Path, name: str) -> None:
    quantize(source, tmp_path / "out", preset(name, ends=True, samples=4, length=24))
    loader = Loader(Checkpoint(tmp_path / "out"))
    assert "model.embed_tokens.weight_scale" in loader.source
    inputs = loader.block(0).linears["q"].inputs
    assert inputs is not None and (inputs.scale is None) == ("static" not in name)
    assert distance(tmp_path / "out", source) < 0.15
    assert verify(tmp_path / "out").problems == []


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("W8A8", {"overrides": ("*.down_proj=4",)}, "inputs are rounded where weights have 8 bits"),
        ("FP8", {"overrides": ("*=4g32",)}, "floats have 8 bits"),
        ("W8A8", {"overrides": ("*=8channel-asym",)}, "no zero points"),
        ("W4A16", {"overrides": ("*=4g48",)}, "64 inputs are not a multiple of the group size 48"),
        ("W4A16", {"overrides": ("*=5",), "format": "gptq_v2"}, "GPTQ holds 2, 3, 4 or 8-bit"),
        (
            "W4A16",
            {"overrides": ("*=4-asym",), "format": "gptq", "symmetric": True},
            "gptq cannot hold every zero point",
        ),
        ("W4A16", {"skip": ("*.nothing",)}, r"'\*.nothing' matches no linear"),
        ("W4A16", {"target_bytes": 1 << 40}, "nothing would be rounded"),
        ("W4A16", {"target_bits": 2.5}, "too few"),
        ("W4A16", {"target_bits": 5.0, "skip": ("*_proj",)}, "too few"),
    ],
    ids=[
        *("bits", "groups", "zeros", "no multiple", "no width", "gptq zeros"),
        *("no match", "too much", "too few", "all skipped"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_done(
    source: Path, name: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        foresee(source, preset(name, **changes))
    assert caught.value.hint and "\n" not in str(caught.value)


def test_a_skip_wins(tmp_path: Path, source: Path) -> None:
    scheme = replace(RTN, skip=("*.down_proj", "lm_head"), overrides=("*.mlp.*=8",))
    quantize(source, tmp_path / "out", scheme)
    found = bits_of(tmp_path / "out")
    assert (found["0.down"], found["0.gate"], found["0.q"]) == (16, 8, 4)


def test_a_target_counts_what_is_skipped(tmp_path: Path, source: Path) -> None:
    quantize(source, tmp_path / "out", replace(RTN, target_bits=7.5, skip=("*.1.*.down_proj",)))
    spec, found = Loader(Checkpoint(source)).spec, Loader(Checkpoint(tmp_path / "out"))
    assert bits_of(tmp_path / "out")["1.down"] == 16
    weights = sum(math.prod(spec.shape(p)) for p in spec.projections) * spec.num_layers
    stored = sum(
        2 * math.prod(held.shape) if isinstance(held := linear.weight, torch.Tensor) else held.nbytes
        for layer in range(spec.num_layers)
        for linear in found.block(layer).linears.values()
    )
    assert 8 * stored / weights <= 7.5


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ({"hidden_size": 96, "intermediate_size": 160}, {32}),
        ({"hidden_size": 80, "intermediate_size": 112}, {16}),
        ({"hidden_size": 100, "intermediate_size": 60, "num_attention_heads": 2}, {100, 60}),
    ],
    ids=["32", "16", "channel"],
)
def test_the_preset_auto_takes_any_width(tmp_path: Path, sizes: dict[str, int], groups: set[int]) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    write_checkpoint(folder, group_size=None, **sizes)
    scheme = preset("auto", method="rtn", samples=4, length=24)
    quantize(folder, tmp_path / "out", scheme)
    loader = Loader(Checkpoint(tmp_path / "out"))
    held = [linear.weight for layer in range(3) for linear in loader.block(layer).linears.values()]
    narrow = [w for w in held if isinstance(w, QuantizedTensor) and w.bits < 8]
    assert {weight.group_size for weight in narrow} == groups


def test_ends_have_a_scale_a_row_where_groups_do_not_fit(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    write_checkpoint(
        folder, group_size=None, hidden_size=96, intermediate_size=128, tie_word_embeddings=False
    )
    scheme = replace(RTN, group_size=64, ends=True, skip=("lm_head",), format="compressed-tensors")
    quantize(folder, tmp_path / "out", scheme)
    loader = Loader(Checkpoint(tmp_path / "out"))
    embed, head = loader.embed(), loader.head()
    assert isinstance(embed, QuantizedTensor) and (embed.bits, embed.group_size) == (8, 96)
    assert head is not None and isinstance(head.weight, torch.Tensor)


def test_settings_name_what_differs(tmp_path: Path, source: Path) -> None:
    quantize(source, tmp_path / "out", replace(RTN, overrides=("*.down_proj=8",)))
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = settings["config_groups"]
    assert groups["group_1"]["targets"] == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert groups["group_1"]["weights"]["num_bits"] == 8


def test_a_target_chooses_among_the_widths_given(tmp_path: Path, source: Path) -> None:
    for widths in ((4, 8), (4, 5, 6)):
        scheme = replace(RTN, target_bits=5.5, widths=widths)
        quantize(source, tmp_path / str(len(widths)), scheme)
        found = set(bits_of(tmp_path / str(len(widths))).values())
        assert found <= {*widths, 16}
        assert len(found) > 1
