"""Levels of 2 to 8 bits as one stream of bits in int32 words: how GPTQ and compressed-tensors pack.

    bit b of level c of a row is bit (c * bits + b) of the row; bit n lies in word n // 32 at place n % 32

so 4-bit level c is nibble c % 8 of word c // 8, and 3-bit levels cross the borders of words (level 10 has two
bits in word 0 and one in word 1). Eight levels always fill `bits` bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def words(count: int, bits: int) -> int:
    """int32 words that `count` levels take."""
    return -(-count * bits // 32)


def whole(bits: int) -> int:
    """The least number of levels that fills words without a rest: 8 for 4 bits, 32 for 3 bits."""
    return 32 // math.gcd(32, bits)


def pack(levels: Tensor, bits: int) -> Tensor:
    """uint8 [R, C] below 2**bits -> int32 [R, words(C, bits)], the last word filled up with zeros."""
    rows, count = levels.shape
    eights = F.pad(levels, (0, -count % 32)).reshape(rows, -1, 8)
    data = levels.new_zeros(rows, eights.shape[1], bits)
    for i, byte, place in _places(bits):
        data[:, :, byte] |= eights[:, :, i] << place
        if place + bits > 8:
            data[:, :, byte + 1] |= eights[:, :, i] >> (8 - place)
    return data.flatten(1).view(torch.int32)[:, : words(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 [R, W] -> uint8 [R, count].

    Eight levels at a time in 64 bits, whose upper half moves up to the middle, then that of each half, then
    of each quarter: three passes over whole words, where one level after another would be many over bytes.
    """
    data = packed.contiguous().view(torch.uint8)
    eights = F.pad(data, (0, -data.shape[1] % bits)).reshape(-1, bits)
    levels = F.pad(eights, (0, 8 - bits)).view(torch.int64)
    for together in (4, 2, 1):
        away = together * (8 - bits)
        if away:
            every = range(0, 64, 16 * together)
            low = sum(((1 << together * bits) - 1) << place for place in every)
            levels = (levels & low) | ((levels & (low << together * bits)) << away)
    return levels.view(torch.uint8).view(packed.shape[0], -1)[:, :count].contiguous()


def _places(bits: int) -> list[tuple[int, int, int]]:
    """For each of eight levels: its number, the byte it starts in, and its lowest bit there."""
    return [(i, *divmod(i * bits, 8)) for i in range(8)]
