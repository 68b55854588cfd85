"""compressed-tensors files: golden words by hand, round trips, mixed groups, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor
from nybble_models.errors import BrokenCheckpoint
from nybble_models.formats.compressed_tensors import IntQuantizedCodec, PackQuantizedCodec
from nybble_models.formats.form import CHANNEL, Form
from nybble_models.formats.gptq import GptqCodec
from nybble_models.formats.overrides import for_linear
from support_quantized import quantized, uniform

PACKED, PLAIN = PackQuantizedCodec(), IntQuantizedCodec()
Codec = PackQuantizedCodec | IntQuantizedCodec


def weight(
    bits: int, group: int, *, zeros: bool = False, n: int = 32, k: int = 64, seed: int = 0
) -> QuantizedTensor:
    made = quantized(n, k, bits, group, "zeros" if zeros else "symmetric", seed)
    return QuantizedTensor(made.codes, made.scales.half().float(), bits, group, made.zeros)


def said(codec: Codec, bits: int, group: int, symmetric: bool) -> Any:
    """The settings of one linear, as the loader finds them."""
    return for_linear(
        codec.settings(uniform(bits, group, symmetric, codec is PLAIN)), "model.layers.0.mlp.down_proj"
    )


def plain(codec: Codec, stored: dict[str, Tensor], made: QuantizedTensor) -> Tensor:
    """[N, K]: (value - zero) * scale over signed integers, element by element."""
    half = 2 ** (made.bits - 1)

    def at(words: list[int], number: int) -> int:
        stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
        return (stream >> (number * made.bits) & (2**made.bits - 1)) - half

    zero = stored.get("weight_zero_point", torch.zeros(0))

    def value(n: int, k: int) -> float:
        g = k // made.group_size
        if codec is PACKED:
            level = at(stored["weight_packed"][n].tolist(), k)
            middle = at(zero[:, g].tolist(), n) if zero.numel() else 0
        else:
            level = int(stored["weight"][n, k])
            middle = int(zero[n, g]) if zero.numel() else 0
        return (level - middle) * float(stored["weight_scale"][n, g])

    return torch.tensor([[value(n, k) for k in range(made.in_features)] for n in range(made.out_features)])


def test_golden_tensors_of_packed_levels() -> None:
    """Ten inputs of signed -8 to 1 take a word and a quarter; zeros 0 and 7 lie along the outputs."""
    codes = torch.arange(10, dtype=torch.uint8).repeat(2, 1)
    zeros = torch.tensor([[8], [15]], dtype=torch.uint8)
    stored = PACKED.encode(QuantizedTensor(codes, torch.tensor([[0.5], [0.25]]), 4, 10, zeros))
    assert stored["weight_packed"].tolist() == [[0x76543210, 0x00000098]] * 2
    assert stored["weight_zero_point"].tolist() == [[0x000000F8]]
    assert stored["weight_scale"].tolist() == [[0.5], [0.25]]
    assert stored["weight_shape"].tolist() == [2, 10]
    assert {name: t.dtype for name, t in stored.items()} == {
        "weight_packed": torch.int32,
        "weight_scale": torch.float16,
        "weight_shape": torch.int64,
        "weight_zero_point": torch.int32,
    }


def test_golden_tensors_of_plain_levels() -> None:
    codes = torch.tensor([[0, 127, 128, 255]], dtype=torch.uint8)
    stored = PLAIN.encode(QuantizedTensor(codes, torch.tensor([[0.5]]), 8, 4))
    assert stored["weight"].tolist() == [[-128, -1, 0, 127]]
    assert stored["weight"].dtype == torch.int8
    assert set(stored) == {"weight", "weight_scale"}


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [-1, 16, 32])
@pytest.mark.parametrize(
    ("codec", "bits"),
    [(PACKED, 4), (PACKED, 8), (PACKED, 3), (PLAIN, 8), (PLAIN, 4)],
    ids=["packed-4", "packed-8", "packed-3", "plain-8", "plain-4"],
)
def test_what_is_encoded_is_decoded(codec: Codec, bits: int, group: int, zeros: bool) -> None:
    made = weight(bits, 64 if group < 0 else group, zeros=zeros)
    stored = codec.encode(made)
    kept = {name: tensor.clone() for name, tensor in stored.items()}
    found = codec.decode(stored, said(codec, bits, group, not zeros))
    assert torch.equal(found.codes, made.codes)
    assert torch.equal(found.dequantize(), made.dequantize())
    assert found.symmetric == made.symmetric
    assert torch.allclose(plain(codec, stored, made), made.dequantize(), atol=1e-6)
    assert all(torch.equal(stored[name], kept[name]) for name in kept)


def test_packed_levels_are_those_of_gptq_on_their_side() -> None:
    made = weight(4, 32)
    assert torch.equal(PACKED.encode(made)["weight_packed"], GptqCodec().encode(made)["qweight"].T)


def test_scales_that_are_no_float16_stay_whole() -> None:
    made = QuantizedTensor(torch.zeros(8, 8, dtype=torch.uint8), torch.full((8, 1), 1 / 3), 4, 8)
    found = PACKED.decode(PACKED.encode(made), said(PACKED, 4, -1, True))
    assert torch.equal(found.scales, made.scales)


@pytest.mark.parametrize("scale", [torch.tensor([0.5]), torch.tensor(0.5)], ids=["[1]", "[]"])
def test_one_scale_may_be_the_whole_tensors(scale: Tensor) -> None:
    values = torch.tensor([[1, -2], [3, -4]], dtype=torch.int8)
    found = PLAIN.decode({"weight": values, "weight_scale": scale}, said(PLAIN, 8, -1, True))
    assert torch.equal(found.dequantize(), values * 0.5)


@pytest.mark.parametrize(("codec", "bits"), [(PACKED, 4), (PLAIN, 8)], ids=["packed", "plain"])
def test_zeros_may_be_left_out_or_stored_as_int8(codec: Codec, bits: int) -> None:
    """Older files store zeros plainly; those of 0 throughout are not stored at all."""
    made = weight(bits, 32, zeros=True)
    assert made.zeros is not None
    stored = codec.encode(made)
    stored["weight_zero_point"] = (made.zeros.short() - 2 ** (bits - 1)).to(torch.int8)
    settings = said(codec, bits, 32, False)
    assert torch.equal(codec.decode(stored, settings).dequantize(), made.dequantize())
    del stored["weight_zero_point"]
    found = codec.decode(stored, settings)
    expected = QuantizedTensor(made.codes, made.scales, bits, 32)
    assert torch.equal(found.dequantize(), expected.dequantize())


def test_older_files_with_an_order_of_inputs_are_read() -> None:
    made = weight(4, 4, n=8, k=8)
    stored = PACKED.encode(made)
    settings = said(PACKED, 4, 4, True)
    g_idx = torch.tensor([1, 0, 0, 1, 1, 0, 0, 1], dtype=torch.int32)
    found = PACKED.decode(stored | {"weight_g_idx": g_idx}, settings)
    expected = (made.codes.float() - 8) * made.scales[:, g_idx.long()]
    assert torch.equal(found.dequantize(), expected)
    unused = PACKED.decode(stored | {"weight_g_idx": torch.full((8,), -1)}, settings)
    assert torch.equal(unused.dequantize(), made.dequantize())


def test_what_other_programs_look_for() -> None:
    found = PLAIN.settings(uniform(8, -1, True, w8a8=True) | {"model.layers.0.mlp.up_proj": None})
    assert found["ignore"] == ["lm_head", "model.layers.0.mlp.up_proj"]
    group = found["config_groups"]["group_0"]
    assert group["weights"] | {"strategy": "channel", "group_size": None} == group["weights"]
    assert group["input_activations"]["strategy"] == "token"
    assert found["format"] == group["format"] == "int-quantized"


def test_linears_of_several_forms_are_groups_of_their_own() -> None:
    """The commonest is every Linear's; the others are named, and a reader finds each by its name."""
    most, other = Form(4, 32), Form(8, CHANNEL, True, inputs="token")
    forms = {"model.layers.0.mlp.up_proj": most, "model.layers.0.mlp.gate_proj": most}
    found = PACKED.settings(
        forms | {"model.layers.0.mlp.down_proj": other, "model.layers.1.mlp.up_proj": None}
    )
    assert found["format"] == "mixed-precision"
    assert found["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert found["config_groups"]["group_1"]["targets"] == ["model.layers.0.mlp.down_proj"]
    assert found["ignore"] == ["lm_head", "model.layers.1.mlp.up_proj"]
    assert for_linear(found, "model.layers.0.mlp.up_proj")["weights"]["num_bits"] == 4
    down = for_linear(found, "model.layers.0.mlp.down_proj")
    assert (down["weights"]["num_bits"], down["format"]) == (8, "int-quantized")


@pytest.mark.parametrize("kind", ["minimums", "order", "groups"])
@pytest.mark.parametrize("codec", [PACKED, PLAIN], ids=["packed", "plain"])
def test_what_the_format_cannot_say_is_refused(codec: Codec, kind: str) -> None:
    base = quantized(8, 64, 4, 48 if kind == "groups" else 32, "minimums" if kind == "minimums" else "zeros")
    order = torch.randperm(64) if kind == "order" else None
    made = QuantizedTensor(base.codes, base.scales, 4, base.group_size, base.zeros, base.minimums, order)
    with pytest.raises(ValueError, match=r"minimums|input order|group size 48"):
        codec.encode(made)


@pytest.mark.parametrize(
    ("codec", "change", "weights"),
    [
        (PACKED, {"weight_packed": torch.zeros(32, 9, dtype=torch.int32)}, {}),
        (PACKED, {"weight_scale": torch.ones(32, 3)}, {}),
        (PACKED, {"weight_zero_point": torch.zeros(32, 3, dtype=torch.int8)}, {"symmetric": False}),
        (PACKED, {}, {"num_bits": 8}),
        (PACKED, {}, {"type": "float"}),
        (PACKED, {}, {"num_bits": None}),
        (PLAIN, {"weight": torch.zeros(32, 64)}, {}),
        (PLAIN, {"weight": torch.full((32, 64), 8, dtype=torch.int8)}, {}),
    ],
    ids=["words", "scales", "zeros", "bits", "floats", "no bits", "float weight", "past its bits"],
)
def test_contradictions_are_refused(codec: Codec, change: dict[str, Tensor], weights: dict[str, Any]) -> None:
    stored = codec.encode(weight(4, 32)) | change
    settings = said(codec, 4, 32, True)
    with pytest.raises(BrokenCheckpoint) as caught:
        codec.decode(stored, settings | {"weights": settings["weights"] | weights})
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_rotated_activations_are_refused() -> None:
    settings = said(PACKED, 4, 32, True) | {"transform_config": {"config_groups": {"R3": {}}}}
    with pytest.raises(BrokenCheckpoint, match="rotated"):
        PACKED.decode(PACKED.encode(weight(4, 32)), settings)


@pytest.mark.parametrize("embed", ["model.embed_tokens", "model.decoder.embed_tokens"])
def test_an_embedding_is_named_whatever_its_form(embed: str) -> None:
    """To other programs it is no `Linear`, and what no group means they fill with random numbers."""
    forms = uniform(8, CHANNEL, True) | {embed: Form(8, CHANNEL, True), "lm_head": Form(8, CHANNEL, True)}
    groups = PACKED.settings(forms)["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["Linear"], [embed]]
    assert groups["group_0"]["weights"] == groups["group_1"]["weights"]
    other = forms | {"model.layers.0.mlp.up_proj": Form(4, 32)}
    targets = [group["targets"] for group in PACKED.settings(other)["config_groups"].values()]
    assert targets == [["Linear"], [embed], ["model.layers.0.mlp.up_proj"]]


def test_an_embedding_does_not_decide_what_linears_are() -> None:
    found = PACKED.settings({"model.embed_tokens": Form(8, CHANNEL, True)} | uniform(4, 32))
    assert found["config_groups"]["group_0"]["weights"]["num_bits"] == 4
