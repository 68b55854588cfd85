"""Levels as a stream of bits: words spelled out by hand, and any count of any width there and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nybble_models.formats import bitstream


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def test_four_bit_levels_lie_from_the_low_nibble_up() -> None:
    """Inputs 0 to 7 hold 1 to 8, 8 to 15 hold 15 to 8."""
    levels = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 15, 14, 13, 12, 11, 10, 9, 8]], dtype=torch.uint8)
    packed = torch.tensor([[signed(0x87654321), signed(0x89ABCDEF)]], dtype=torch.int32)
    assert torch.equal(bitstream.pack(levels, 4), packed)
    assert torch.equal(bitstream.unpack(packed, 4, 16), levels)


def test_two_and_eight_bit_levels_lie_from_the_low_bits_up() -> None:
    twos = torch.tensor([[0, 1, 2, 3] * 4], dtype=torch.uint8)
    assert bitstream.pack(twos, 2).tolist() == [[signed(0xE4E4E4E4)]]
    assert bitstream.pack(torch.tensor([[1, 2, 3, 255]], dtype=torch.uint8), 8).tolist() == [
        [signed(0xFF030201)]
    ]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (0, (0x00000007, 0, 0)),
        (9, (0x38000000, 0, 0)),
        (10, (0xC0000000, 0x00000001, 0)),  # two bits below the border, one above
        (11, (0, 0x0000000E, 0)),
        (20, (0, 0x70000000, 0)),
        (21, (0, 0x80000000, 0x00000003)),  # one below, two above
        (22, (0, 0, 0x0000001C)),
        (31, (0, 0, 0xE0000000)),
    ],
)
def test_three_bit_levels_cross_the_borders_of_words(place: int, words: tuple[int, ...]) -> None:
    levels = torch.zeros(1, 32, dtype=torch.uint8)
    levels[0, place] = 7
    packed = torch.tensor([[signed(w) for w in words]], dtype=torch.int32)
    assert torch.equal(bitstream.pack(levels, 3), packed)
    assert torch.equal(bitstream.unpack(packed, 3, 32), levels)


@given(st.integers(2, 8), st.integers(1, 3), st.integers(1, 100), st.integers(0, 99))
def test_levels_come_back(bits: int, rows: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 2**bits, (rows, count), generator=generator, dtype=torch.uint8)
    packed = bitstream.pack(levels, bits)
    assert packed.shape == (rows, bitstream.words(count, bits))
    assert torch.equal(bitstream.unpack(packed, bits, count), levels)
    rest = [row[-1] & 0xFFFFFFFF for row in packed.tolist()]
    assert all(word >> ((count * bits - 1) % 32 + 1) == 0 for word in rest)  # filled up with zeros


@pytest.mark.parametrize(("bits", "count"), [(2, 16), (3, 32), (4, 8), (5, 32), (6, 16), (8, 4)])
def test_levels_that_fill_words(bits: int, count: int) -> None:
    assert bitstream.whole(bits) == count


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (2, (0xB1B1B1B1, 0xB1B1B1B1)),
        (3, (0xE1CC55E1, 0x55E1CC55, 0xCC55E1CC)),
        (4, (0x630DA741, 0xEB852FC9, 0x630DA741, 0xEB852FC9)),
        (5, (0xE0D51C81, 0x517F99B4, 0x5E9172D0, 0x8930C1DD, 0xF6F1593D)),
        (6, (0x0D287101, 0xF7195934, 0xBABA2589, 0x3DEB7D31, 0xF3091830, 0x79B61548)),
        (7, (0xD141C201, 0x192C4C80, 0x425447CE, 0xDA315CAD, 0x0E03D74D, 0x53E6498D, 0xBD6EC55A)),
    ],
)
def test_words_that_compressed_tensors_makes(bits: int, words: tuple[int, ...]) -> None:
    """Of its release 0.20, `pack_to_int32` makes these of the levels 3k + 1."""
    levels = torch.tensor([[(3 * k + 1) % 2**bits for k in range(32)]], dtype=torch.uint8)
    assert bitstream.pack(levels, bits).tolist() == [[signed(word) for word in words]]
