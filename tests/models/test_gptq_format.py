"""GPTQ files bit by bit: golden words by hand, round trips, and values against the format's plain formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor, dense
from nybble_models.errors import BrokenCheckpoint
from nybble_models.formats import bitstream
from nybble_models.formats.form import Form
from nybble_models.formats.gptq import GptqCodec
from support_quantized import quantized, uniform

V1, V2 = GptqCodec(), GptqCodec(version=2, act_order=True)


def settings(bits: int, group: int, **changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": True} | changes


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def weight(
    bits: int,
    group: int,
    *,
    zeros: bool = False,
    order: bool = False,
    n: int = 32,
    k: int = 64,
    seed: int = 0,
) -> QuantizedTensor:
    """Scales are float16 numbers, zeros are at least 1: what v1 can say."""
    made = quantized(n, k, bits, group, "zeros" if zeros else "symmetric", seed)
    generator = torch.Generator().manual_seed(seed)
    return QuantizedTensor(
        made.codes,
        made.scales.half().float(),
        bits,
        group,
        zeros=None if made.zeros is None else made.zeros.clamp(min=1),
        permutation=torch.randperm(k, generator=generator) if order else None,
    )


def level(words: list[int], number: int, bits: int) -> int:
    """Level `number` of a stream, the words laid end to end as one integer."""
    stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return stream >> (number * bits) & (2**bits - 1)


def plain(stored: dict[str, Tensor], bits: int, less: int) -> Tensor:
    """[N, K]: (level - zero) * scale, one element after the other in Python's integers."""
    columns, rows = stored["qweight"].T.tolist(), stored["qzeros"].tolist()
    g_idx = stored["g_idx"].tolist()
    value = [
        [
            (level(columns[n], k, bits) - level(rows[g], n, bits) - less) * float(stored["scales"][g, n])
            for k, g in enumerate(g_idx)
        ]
        for n in range(len(columns))
    ]
    return torch.tensor(value)


def test_golden_tensors_of_a_linear() -> None:
    """Eight outputs, sixteen inputs in two groups; output n holds n below and 15 - n above; zeros 8 and 1."""
    codes = torch.tensor([[n] * 8 + [15 - n] * 8 for n in range(8)], dtype=torch.uint8)
    scales = torch.tensor([[0.5, 0.25]] * 8)
    zeros = torch.tensor([[8, 1]] * 8, dtype=torch.uint8)
    made = QuantizedTensor(codes, scales, bits=4, group_size=8, zeros=zeros)
    first, second = V1.encode(made), V2.encode(made)
    rows = [[signed(0x11111111 * n) for n in range(8)], [signed(0x11111111 * (15 - n)) for n in range(8)]]
    assert first["qweight"].tolist() == second["qweight"].tolist() == rows
    assert first["qzeros"].tolist() == [[0x77777777], [0]]
    assert second["qzeros"].tolist() == [[signed(0x88888888)], [0x11111111]]
    assert first["scales"].tolist() == [[0.5] * 8, [0.25] * 8]
    assert first["g_idx"].tolist() == [0] * 8 + [1] * 8
    assert {name: t.dtype for name, t in first.items()} == {
        "qweight": torch.int32,
        "qzeros": torch.int32,
        "scales": torch.float16,
        "g_idx": torch.int32,
    }


@pytest.mark.parametrize(
    ("bits", "first", "second"),
    [
        (2, (0x55555555,), (0xAAAAAAAA,)),
        (3, (0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D), (0x24924924, 0x49249249, 0x92492492)),
        (4, (0x77777777,), (0x88888888,)),
        (8, (0x7F7F7F7F,), (0x80808080,)),
    ],
)
def test_the_zeros_of_a_symmetric_file(bits: int, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    made = weight(bits, 64, n=32)
    for codec, words in ((V1, first), (V2, second)):
        repeats = bits // len(words)
        assert codec.encode(made)["qzeros"].tolist() == [[signed(w) for w in words] * repeats]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [-1, 32, 128, 24])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_is_encoded_is_decoded(bits: int, group: int, zeros: bool, order: bool, version: int) -> None:
    """128 inputs: groups of 24 leave a short one."""
    made = weight(bits, 128 if group < 0 else group, zeros=zeros, order=order, k=128)
    codec = GptqCodec(version=2 if version == 2 else 1, act_order=True)
    stored = codec.encode(made)
    found = V1.decode(stored, codec.settings(uniform(bits, group, not zeros)))
    assert torch.equal(found.dequantize(), made.dequantize())
    assert found.symmetric == made.symmetric
    assert (found.permutation is not None) == (order and made.scales.shape[1] > 1)
    again = codec.encode(found)
    assert all(torch.equal(again[name], stored[name]) for name in stored)
    assert torch.allclose(plain(stored, bits, 2 - version), made.dequantize(), atol=1e-6)


@given(
    st.sampled_from([2, 3, 4, 8]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 96),
    st.integers(0, 99),
)
def test_any_shape_and_group_survives(bits: int, n: int, k: int, group: int, seed: int) -> None:
    made = weight(bits, group, zeros=True, order=True, n=32 * n, k=32 * k, seed=seed)
    found = V2.decode(V2.encode(made), V2.settings(uniform(bits, group)))
    assert torch.equal(found.dequantize(), made.dequantize())


def test_act_order_becomes_groups_and_a_permutation() -> None:
    """Inputs 0 3 4 7 are of group 1, the others of group 0."""
    made = weight(4, 4, n=8, k=8)
    stored = V1.encode(made)
    stored["g_idx"] = torch.tensor([1, 0, 0, 1, 1, 0, 0, 1], dtype=torch.int32)
    found = V1.decode(stored, settings(4, 4, desc_act=True))
    assert found.permutation is not None
    assert found.permutation.tolist() == [1, 2, 5, 6, 0, 3, 4, 7]
    assert torch.equal(found.codes, made.codes[:, found.permutation])
    assert torch.equal(found.dequantize(), plain(stored, 4, 1))


@pytest.mark.parametrize(
    "g_idx", [None, [0, 0, 0, 0, 1, 1, 1, 1], [0] * 8], ids=["absent", "static", "not filled in"]
)
def test_a_trivial_order_costs_nothing(g_idx: list[int] | None) -> None:
    made = weight(4, 4, n=8, k=8)
    stored = V1.encode(made)
    del stored["g_idx"]
    if g_idx is not None:
        stored["g_idx"] = torch.tensor(g_idx, dtype=torch.int32)
    found = V1.decode(stored, settings(4, 4, desc_act=True))
    assert found.permutation is None
    assert torch.equal(found.dequantize(), made.dequantize())


def test_whole_groups_exchanged_need_no_permutation() -> None:
    stored = V2.encode(weight(4, 4, zeros=True, n=8, k=8)) | {
        "g_idx": torch.tensor([1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.int32)
    }
    found = V2.decode(stored, settings(4, 4, sym=False, checkpoint_format="gptq_v2"))
    assert found.permutation is None
    assert torch.equal(found.dequantize(), plain(stored, 4, 0))


def test_inputs_are_left_alone() -> None:
    made = weight(3, 32, zeros=True, order=True)
    before = made.codes.clone()
    stored = V2.encode(made)
    kept = {name: tensor.clone() for name, tensor in stored.items()}
    V2.decode(stored, settings(3, 32, sym=False, checkpoint_format="gptq_v2"))
    assert torch.equal(made.codes, before)
    assert all(torch.equal(stored[name], kept[name]) for name in kept)


@pytest.mark.parametrize("label", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("written", [V1, V2], ids=["v1", "v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_symmetric_file_is_read_by_its_zeros(bits: int, written: GptqCodec, label: str | None) -> None:
    made = weight(bits, 32)
    found = V1.decode(written.encode(made), settings(bits, 32, checkpoint_format=label))
    assert found.symmetric
    assert torch.equal(found.dequantize(), made.dequantize())


def test_an_asymmetric_file_is_read_by_its_label() -> None:
    """Stored zeros of 8 throughout mean 9 in v1."""
    made = weight(4, 32)
    stored = V2.encode(made)
    found = V1.decode(stored, settings(4, 32, sym=False))
    assert found.zeros is not None
    assert bool((found.zeros == 9).all())
    assert torch.equal(found.dequantize(), plain(stored, 4, 1))


def test_symmetric_three_bit_zeros_of_older_gptqmodels_are_known() -> None:
    """0b100 throughout, less 0x24924924, 0x92492492 and 0x49249249: the first and last exchanged."""
    made = weight(3, 32, n=64)
    stored = V2.encode(made)
    ones = torch.tensor([0x24924924, 0x92492492, 0x49249249] * 2)
    words = (stored["qzeros"].long() - ones) & 0xFFFFFFFF
    stored["qzeros"] = torch.where(words >= 2**31, words - 2**32, words).int()
    found = V1.decode(stored, settings(3, 32))
    assert torch.equal(found.dequantize(), made.dequantize())


def test_three_bit_zeros_that_fill_no_three_words_are_read() -> None:
    """Files are not held to the multiples that `fits` asks for: 40 outputs take four words."""
    stored = {
        "qweight": torch.zeros(6, 40, dtype=torch.int32),
        "qzeros": bitstream.pack(torch.full((2, 40), 6, dtype=torch.uint8), 3),
        "scales": torch.ones(2, 40, dtype=torch.float16),
    }
    assert torch.equal(V1.decode(stored, settings(3, 32)).dequantize(), torch.full((40, 64), -7.0))


@pytest.mark.parametrize(("bits", "one"), [(2, 0x55555555), (4, 0x11111111), (8, 0x01010101)])
def test_a_zero_that_borrowed_from_its_neighbour_gives_back(bits: int, one: int) -> None:
    """GPTQModel subtracts whole words, zeros of 0 among them; adding whole words undoes it."""
    made = quantized(32, 64, bits, 8, "zeros")
    made = QuantizedTensor(made.codes, made.scales.half().float(), bits, 8, made.zeros)
    stored = V2.encode(made)
    words = (stored["qzeros"].long() - one) & 0xFFFFFFFF
    stored["qzeros"] = torch.where(words >= 2**31, words - 2**32, words).int()
    found = V1.decode(stored, settings(bits, 8, sym=False))
    assert torch.equal(dense(found), dense(made))


@pytest.mark.parametrize(
    ("shape", "bits", "reason"),
    [
        ((32, 32), 5, "not 5-bit"),
        ((12, 32), 4, "12 outputs are not a multiple of 8"),
        ((32, 48), 3, "48 inputs are not a multiple of 32"),
        ((8, 32), 2, "8 outputs are not a multiple of 16"),
        ((32, 32), 3, None),
        ((4, 12), 8, None),
    ],
)
def test_it_says_what_it_cannot_hold(shape: tuple[int, int], bits: int, reason: str | None) -> None:
    found = V1.fits(shape, Form(bits, 32))
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (quantized(8, 32, 4, 32, "minimums"), "integer zero points"),
        (quantized(8, 32, 4, 32, "symmetric"), "float16 scales"),
        (quantized(12, 32, 4, 32, "symmetric"), "12 outputs"),
        (weight(4, 32, order=True), "act_order"),
        (
            QuantizedTensor(
                torch.zeros(8, 8, dtype=torch.uint8),
                torch.ones(8, 1),
                4,
                8,
                torch.zeros(8, 1, dtype=torch.uint8),
            ),
            "no zero point 0",
        ),
    ],
    ids=["minimums", "scales", "width", "order", "zero"],
)
def test_what_v1_cannot_say_is_refused(made: QuantizedTensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        V1.encode(made)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"qzeros": torch.zeros(1, 2, dtype=torch.int32)}, {}),
        ({"scales": torch.ones(3, 32, dtype=torch.float16)}, {}),
        ({"qweight": torch.zeros(8, 32, dtype=torch.int16)}, {}),
        ({"g_idx": torch.zeros(63, dtype=torch.int32)}, {}),
        ({"g_idx": torch.full((64,), 2, dtype=torch.int32)}, {}),
        ({"g_idx": torch.arange(64, dtype=torch.int32) % 3 // 2}, {}),
        ({}, {"bits": 8}),
        ({}, {"bits": 5}),
        ({}, {"group_size": 16}),
        ({}, {"checkpoint_format": "marlin"}),
        ({}, {"pack_dtype": "int16"}),
    ],
    ids=[
        "zeros shape",
        "scales shape",
        "dtype",
        "order length",
        "order range",
        "order sizes",
        "bits",
        "width",
        "group",
        "layout",
        "words",
    ],
)
def test_contradictions_are_refused(change: dict[str, Tensor], said: dict[str, Any]) -> None:
    stored = V1.encode(weight(4, 32))
    with pytest.raises(BrokenCheckpoint) as caught:
        V1.decode(stored | change, settings(4, 32) | said)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
