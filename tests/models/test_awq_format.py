from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nybble_kernels.quantized import QuantizedTensor
from nybble_models.errors import BrokenCheckpoint
from nybble_models.formats.awq import AwqCodec, pack, unpack
from nybble_models.formats.form import Form
from support_quantized import quantized

CODEC = AwqCodec()
SETTINGS: dict[str, Any] = {"bits": 4, "version": "gemm", "zero_point": True}


def test_nibbles_lie_in_the_order_0_2_4_6_1_3_5_7() -> None:
    """Column k holds level k + 1; from the low nibble up the word reads columns 0 2 4 6 1 3 5 7."""
    levels = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8)
    assert pack(levels).tolist() == [[0x86427531 - 2**32]]
    assert unpack(torch.tensor([[0x86427531 - 2**32]], dtype=torch.int32)).tolist() == levels.tolist()


def test_a_word_past_the_sign_bit_survives() -> None:
    """int32 -1 is eight nibbles of 15; 0x70000000 holds 7 in column 7 alone."""
    assert unpack(torch.tensor([[-1]], dtype=torch.int32)).tolist() == [[15] * 8]
    assert unpack(torch.tensor([[0x70000000]], dtype=torch.int32)).tolist() == [[0, 0, 0, 0, 0, 0, 0, 7]]
    assert pack(torch.full((1, 8), 15, dtype=torch.uint8)).tolist() == [[-1]]


def test_golden_tensors_of_a_linear() -> None:
    """Eight outputs, two inputs in groups of one: rows of qweight are inputs, zeros are stored as is."""
    codes = torch.tensor([[n, 15 - n] for n in range(8)], dtype=torch.uint8)
    scales = torch.tensor([[0.5, 0.25]] * 8)
    zeros = torch.tensor([[8, 7]] * 8, dtype=torch.uint8)
    stored = CODEC.encode(QuantizedTensor(codes, scales, bits=4, group_size=1, zeros=zeros))
    assert stored["qweight"].tolist() == [[0x75316420], [0x8ACE9BDF - 2**32]]
    assert stored["qzeros"].tolist() == [[0x88888888 - 2**32], [0x77777777]]
    assert stored["scales"].tolist() == [[0.5] * 8, [0.25] * 8]
    assert {name: t.dtype for name, t in stored.items()} == {
        "qweight": torch.int32,
        "qzeros": torch.int32,
        "scales": torch.float16,
    }


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 8, 32]), st.booleans(), st.integers(0, 99))
def test_what_is_encoded_is_decoded(words: int, groups: int, size: int, zeros: bool, seed: int) -> None:
    weight = quantized(8 * words, groups * size, 4, size, "zeros" if zeros else "symmetric", seed)
    weight = QuantizedTensor(weight.codes, weight.scales.half().float(), 4, size, weight.zeros)
    found = CODEC.decode(CODEC.encode(weight), SETTINGS | {"zero_point": zeros})
    assert torch.equal(found.codes, weight.codes)
    assert torch.equal(found.scales, weight.scales)
    assert torch.equal(found.dequantize(), weight.dequantize())
    assert found.symmetric == weight.symmetric


def test_inputs_are_left_alone() -> None:
    weight = quantized(16, 64, 4, 32, "zeros")
    before = weight.codes.clone()
    stored = CODEC.encode(weight)
    kept = {name: tensor.clone() for name, tensor in stored.items()}
    CODEC.decode(stored, SETTINGS)
    assert torch.equal(weight.codes, before)
    assert all(torch.equal(stored[name], kept[name]) for name in kept)


@pytest.mark.parametrize(
    ("shape", "bits", "group", "reason"),
    [
        ((8, 32), 3, 32, "4-bit"),
        ((12, 32), 4, 32, "multiple of 8"),
        ((8, 48), 4, 32, "group size"),
        ((8, 32), 4, 32, None),
    ],
    ids=["bits", "outputs", "inputs", "fits"],
)
def test_it_says_what_it_cannot_hold(
    shape: tuple[int, int], bits: int, group: int, reason: str | None
) -> None:
    found = CODEC.fits(shape, Form(bits, group))
    assert found is None if reason is None else reason in str(found)


def test_real_minimums_are_refused() -> None:
    with pytest.raises(ValueError, match="integer zero points"):
        CODEC.encode(quantized(8, 32, 4, 32, "minimums"))


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        ({"qzeros": torch.zeros(1, 2, dtype=torch.int32)}, {}),
        ({"scales": torch.ones(3, 8, dtype=torch.float16)}, {}),
        ({}, {"bits": 8}),
        ({}, {"version": "gemv"}),
    ],
    ids=["zeros shape", "scales shape", "bits", "layout"],
)
def test_contradictions_are_refused(change: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    stored = CODEC.encode(quantized(8, 64, 4, 32, "zeros"))
    with pytest.raises(BrokenCheckpoint) as caught:
        CODEC.decode(stored | change, SETTINGS | settings)
    assert caught.value.hint
