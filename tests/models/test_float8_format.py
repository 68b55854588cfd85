"""float-quantized files and rounded inputs: golden bytes by hand, round trips, blocks, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nybble_kernels.activations import Activations
from nybble_kernels.float8 import Float8Tensor
from nybble_models.checkpoint import Checkpoint
from nybble_models.errors import BrokenCheckpoint
from nybble_models.footprint import linear_held_as
from nybble_models.formats.awq import AwqCodec
from nybble_models.formats.compressed_tensors import (
    FloatQuantizedCodec,
    IntQuantizedCodec,
    PackQuantizedCodec,
)
from nybble_models.formats.config_groups import activations_of
from nybble_models.formats.container import container
from nybble_models.formats.form import CHANNEL, TENSOR, Form, Inputs, Kind
from nybble_models.formats.gptq import GptqCodec
from nybble_models.formats.overrides import for_linear
from nybble_models.loader import Loader
from nybble_models.weights import Linear
from support_checkpoint import write_checkpoint
from support_quantized import quantized

CODEC, CONTAINER = FloatQuantizedCodec(), container("compressed-tensors")
NAME = "model.layers.0.mlp.up_proj"
FP8 = Form(8, CHANNEL, True, "float", "token")


def weight(n: int = 24, k: int = 40, *, whole: bool = False) -> Float8Tensor:
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(n, k, generator=generator) * 90).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = (torch.rand(n, 1, generator=generator) + 0.5).half().float()
    return Float8Tensor(values, scales[:1].expand(n, 1).contiguous() if whole else scales, k)


def said(form: Form, **weights: Any) -> dict[str, Any]:
    """The settings of one linear, as the loader finds them."""
    settings = for_linear(CODEC.settings({NAME: form}), NAME)
    return dict(settings) | {"weights": settings["weights"] | weights}


def test_golden_bytes() -> None:
    """0x38 is 1, 0x7E is 448, 0x01 is 2⁻⁹, the sign is on top: as the type is defined."""
    values = torch.tensor([[1.0, 448.0, 2.0**-9], [-1.0, -448.0, -0.0]]).to(torch.float8_e4m3fn)
    stored = CODEC.encode(Float8Tensor(values, torch.tensor([[0.5], [0.25]]), 3))
    assert stored["weight"].view(torch.uint8).tolist() == [[0x38, 0x7E, 0x01], [0xB8, 0xFE, 0x80]]
    assert stored["weight"].dtype == torch.float8_e4m3fn
    assert stored["weight_scale"].tolist() == [[0.5], [0.25]]
    assert set(stored) == {"weight", "weight_scale"}


@pytest.mark.parametrize("inputs", [None, "token", "tensor"], ids=["weights only", "dynamic", "static"])
@pytest.mark.parametrize("group", [CHANNEL, TENSOR], ids=["channel", "tensor"])
def test_what_is_encoded_is_decoded(group: int, inputs: Inputs | None) -> None:
    form = Form(8, group, True, "float", inputs)
    made = weight(whole=group == TENSOR)
    given = None if inputs is None else Activations("float", 0.75 if inputs == "tensor" else None)
    stored = CONTAINER.encode(Linear(made, inputs=given), form)
    assert stored["weight_scale"].shape == ((1,) if group == TENSOR else (24, 1))
    assert stored.get("input_scale", torch.zeros(0)).tolist() == ([0.75] if inputs == "tensor" else [])
    kept = {name: tensor.clone() for name, tensor in stored.items()}
    settings = said(form)
    found = CODEC.decode(stored, settings)
    assert torch.equal(found.dequantize(), made.dequantize())
    assert activations_of(settings, stored) == given
    assert all(torch.equal(stored[name].float(), kept[name].float()) for name in kept)


@pytest.mark.parametrize("inputs", ["token", "tensor"], ids=["dynamic", "static"])
def test_plain_integers_say_what_their_inputs_are(inputs: Inputs) -> None:
    form = Form(8, CHANNEL, True, "int", inputs)
    made = quantized(8, 16, 8, 16, "symmetric")
    given = Activations("int", 0.03125 if inputs == "tensor" else None)
    stored = CONTAINER.encode(Linear(made, inputs=given), form)
    settings = said(form)
    assert activations_of(settings, stored) == given
    assert torch.equal(IntQuantizedCodec().decode(stored, settings).dequantize(), made.dequantize())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["zeros", "symmetric"])
def test_one_scale_of_a_matrix_of_integers_is_stored_once(kind: str, bits: int) -> None:
    made = quantized(9, 16, bits, 16, kind)
    zeros = None if made.zeros is None else made.zeros[:1].expand(9, 1)
    alike = type(made)(made.codes, made.scales[:1].expand(9, 1), bits, 16, zeros)
    form = Form(bits, TENSOR, kind == "symmetric")
    stored = CONTAINER.encode(Linear(alike), form)
    assert stored["weight_scale"].shape == (1,)
    assert ("weight_zero_point" in stored) == (kind == "zeros")
    found = PackQuantizedCodec().decode(stored, said(form))
    assert torch.equal(found.dequantize(), alike.dequantize())


@pytest.mark.parametrize("structure", [[16, 32], "16x32"], ids=["list", "text"])
def test_blocks_are_read(structure: Any) -> None:
    """FP8_BLOCK: a scale for every 16 rows and 32 columns, short ones at the ends. Inputs are left alone."""
    values = weight(40, 80).values
    scale = torch.rand(3, 3, generator=torch.Generator().manual_seed(2)) + 0.5
    settings = said(FP8, strategy="block", block_structure=structure)
    settings["input_activations"] = settings["input_activations"] | {"strategy": "group", "group_size": 32}
    found = CODEC.decode({"weight": values, "weight_scale": scale.bfloat16()}, settings)
    expected = torch.tensor(
        [
            [float(values[n, k].float() * scale[n // 16, k // 32].bfloat16().float()) for k in range(80)]
            for n in range(40)
        ]
    )
    assert torch.equal(found.dequantize(), expected)
    assert activations_of(settings, {}) is None


def test_square_blocks_are_written() -> None:
    """A scale for every 16 rows and columns, short ones at the ends."""
    values = weight(40, 72).values
    scale = torch.rand(3, 5, generator=torch.Generator().manual_seed(2)).half()
    form = Form(8, 16, True, "float", "group")
    settings = said(form)
    assert settings["weights"]["block_structure"] == [16, 16]
    assert settings["weights"]["group_size"] is None
    made = CODEC.decode({"weight": values, "weight_scale": scale}, settings)
    stored = CONTAINER.encode(Linear(made), form)
    assert torch.equal(stored["weight_scale"], scale)
    assert torch.equal(CODEC.decode(stored, settings).dequantize(), made.dequantize())
    assert settings["input_activations"]["group_size"] == 16 and settings["input_activations"]["dynamic"]
    assert form.nbytes((40, 72)) == 40 * 72 + 2 * 15
    assert form.label == "fp8-block"


def test_blocks_that_are_no_squares_are_not_written() -> None:
    made = weight(40, 80)
    scales = torch.rand(40, 5)
    with pytest.raises(ValueError, match="square block"):
        CODEC.encode(Float8Tensor(made.values, scales, 16))


@pytest.mark.parametrize("shape", [(1,), (), (24,)], ids=["[1]", "[]", "[N]"])
def test_scales_come_in_several_shapes(shape: tuple[int, ...]) -> None:
    made = weight()
    scale = torch.full(shape, 0.5)
    found = CODEC.decode({"weight": made.values, "weight_scale": scale}, said(FP8))
    assert torch.equal(found.dequantize(), made.values.float() * 0.5)


@pytest.mark.parametrize(
    ("change", "weights", "message"),
    [
        ({"weight": torch.zeros(24, 40)}, {}, "float8_e4m3fn"),
        ({"weight": torch.full((24, 40), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)}, {}, "NaN"),
        ({"weight_scale": torch.ones(7, 1)}, {}, "does not fit"),
        ({}, {"strategy": "block", "block_structure": [16, 16]}, "blocks"),
        ({}, {"strategy": "block", "block_structure": None}, "block_structure"),
        ({}, {"strategy": "block", "block_structure": "16xx"}, "block_structure"),
    ],
    ids=["type", "not a number", "scales", "block scales", "no blocks", "broken blocks"],
)
def test_contradictions_are_refused(change: dict[str, Tensor], weights: dict[str, Any], message: str) -> None:
    with pytest.raises(BrokenCheckpoint, match=message) as caught:
        CODEC.decode(CODEC.encode(weight()) | change, said(FP8, **weights))
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def asked(**changes: Any) -> dict[str, Any]:
    settings = said(FP8)
    return settings | {"input_activations": settings["input_activations"] | changes}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (asked(), Activations("float")),
        (asked(strategy="tensor", dynamic=True), Activations("float")),
        (asked(strategy=None), Activations("float")),
        (asked(type="int"), Activations("int")),
        (asked(symmetric=False), None),
        (asked(num_bits=4), None),
        (asked(strategy="group", group_size=128), None),
        (asked(strategy="tensor_group", dynamic="local"), None),
        (asked() | {"input_activations": None}, None),
        ({"bits": 4, "group_size": 128}, None),
    ],
    ids=[
        "token",
        "tensor",
        "unsaid",
        "int",
        "zero point",
        "4 bits",
        "groups",
        "local",
        "none",
        "other method",
    ],
)
def test_what_inputs_are_rounded_to(settings: dict[str, Any], expected: Activations | None) -> None:
    assert activations_of(settings, {}) == expected


@pytest.mark.parametrize(
    "scale",
    [None, torch.ones(2), torch.zeros(1), torch.tensor([float("nan")])],
    ids=["none", "two", "zero", "not a number"],
)
def test_a_static_scale_must_be_one_positive_number(scale: Tensor | None) -> None:
    settings = asked(strategy="tensor", dynamic=False)
    with pytest.raises(BrokenCheckpoint, match="input_scale") as caught:
        activations_of(settings, {} if scale is None else {"input_scale": scale})
    assert caught.value.hint


@pytest.mark.parametrize("kind", ["int", "float"])
def test_settings_say_by_which_codec_a_linear_is_read(kind: Kind) -> None:
    settings = said(Form(8, CHANNEL, True, kind, "token"))
    assert FloatQuantizedCodec().reads(settings) == (kind == "float")
    assert IntQuantizedCodec().reads(settings) == (kind == "int")


def test_what_other_programs_look_for() -> None:
    found = CODEC.settings({NAME: FP8, "model.layers.0.mlp.down_proj": None})
    group = found["config_groups"]["group_0"]
    assert found["format"] == group["format"] == "float-quantized"
    assert group["weights"] | {"type": "float", "num_bits": 8, "strategy": "channel"} == group["weights"]
    assert group["input_activations"] == {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    static = CODEC.settings({NAME: Form(8, TENSOR, True, "float", "tensor")})["config_groups"]["group_0"]
    assert static["weights"]["strategy"] == static["input_activations"]["strategy"] == "tensor"
    assert static["input_activations"]["dynamic"] is False


def test_floats_go_nowhere_else() -> None:
    made = weight(32, 32)
    for codec in (AwqCodec(), GptqCodec(), PackQuantizedCodec(), IntQuantizedCodec()):
        with pytest.raises(ValueError, match="integer levels"):
            codec.encode(made)
        assert codec.fits((32, 32), FP8)
    with pytest.raises(ValueError, match="8-bit floats"):
        CODEC.encode(quantized(8, 16, 8, 16, "symmetric"))
    assert CODEC.fits((32, 32), FP8) is None
    assert CODEC.fits((40, 24), Form(8, 16, True, "float")) is None
    assert CODEC.fits((32, 32), Form(8, CHANNEL, True))


@pytest.mark.parametrize(
    ("weights", "widens", "bits"),
    [({}, False, 8), ({}, True, 16), ({"strategy": "block", "block_structure": [128, 128]}, False, 16)],
    ids=["gpu", "cpu", "blocks"],
)
def test_memory_is_planned_for_what_is_held(
    tmp_path: Path, weights: dict[str, Any], widens: bool, bits: int
) -> None:
    write_checkpoint(tmp_path, group_size=None)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    stored |= {f"{name}.{part}": t for part, t in CODEC.encode(weight(96, 64)).items()}
    save_file(stored, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = CODEC.settings({NAME: FP8})
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= weights
    (tmp_path / "config.json").write_text(json.dumps(config))
    loader = Loader(Checkpoint(tmp_path))
    assert linear_held_as(loader, 1, "up", widens=widens).bits == bits
    assert linear_held_as(loader, 0, "up", widens=widens).bits == 16
