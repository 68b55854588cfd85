"""Weights in the order of tensor cores: the 16 bytes a lane loads are the registers it multiplies with.

The unit is 16 rows by 64 inputs. `mma` wants, from lane l of a warp, for each of the four 16 x 16 pieces of a
unit, the elements at row `h·8 + l // 4` and column `c·8 + (l % 4)·2 + j` (h, c, j in {0, 1}; PTX ISA, "Matrix
fragments for mma.m16n8k16"). So a lane's share of a unit is stored side by side:

    4 bits   one word a piece; element (h, c, j) is the nibble at 4·(2·c + h) + 16·j
    8 bits   two words a piece, in two planes (c = 0, then c = 1); element (h, j) is the byte at 8·h + 16·j

Words of a 4-bit unit: [lane, piece]; of an 8-bit unit: [plane, lane, piece]. One 16-byte load a lane, no trip
through shared memory, and the two halves of a word are the two halves of a register.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nybble_kernels.quantized import QuantizedTensor

ROWS = 16  # outputs of a unit
INPUTS = 64  # inputs of a unit
ROW_TILE = 64  # outputs are padded to whole tiles of the smallest kernel
GROUPS = 32  # the finest group the kernel scales by


class UnsupportedLayout(ValueError):
    """A weight that no Triton kernel reads as it is."""


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A `QuantizedTensor` on a device, ready for `linear_w4a16`.

    words: int32 [rows / 16, inputs / 64, 32 · bits] · scales: float [G, rows] · zeros: uint8 [G, rows] or
    None · minimums: float32 [G, rows] or None; rows and inputs padded (to 64 each), the padding adds nothing.
    `order` permutes the inputs (act-order), int64 [K] or None.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    minimums: Tensor | None
    order: Tensor | None
    bits: int  # of a stored code: 4 or 8
    center: int  # zero point of every group where none is stored
    group_size: int  # inputs that share a scale; 0: the whole row
    outputs: int
    inputs: int

    @property
    def nbytes(self) -> int:
        held = (self.words, self.scales, self.zeros, self.minimums)
        return sum(t.nbytes for t in held if t is not None)


def pack(weight: QuantizedTensor) -> PackedWeight:
    """Arrange where the tensor lies. Raises `UnsupportedLayout` for groups no multiple of 32."""
    outputs, inputs = weight.shape
    group, repeat = _group_size(weight)
    rows = -outputs % ROW_TILE
    bits = 4 if weight.bits <= 4 else 8
    codes = F.pad(weight.codes, (0, -inputs % INPUTS, 0, rows))

    def by_group(values: Tensor | None) -> Tensor | None:
        """[N, G] -> [G, rows]: a kernel reads neighbouring outputs of one group at once."""
        if values is None:
            return None
        fine = values.repeat_interleave(repeat, dim=1)
        groups = codes.shape[1] // group if group == GROUPS else fine.shape[1]  # both halves of every unit
        return F.pad(fine, (0, groups - fine.shape[1], 0, rows)).t().contiguous()

    scales = by_group(weight.scales)
    assert scales is not None
    return PackedWeight(
        words=(_nibbles if bits == 4 else _bytes)(codes),
        scales=_exact(scales),
        zeros=by_group(weight.zeros),
        minimums=by_group(weight.minimums),
        order=weight.permutation,
        bits=bits,
        center=0 if weight.minimums is not None else 2 ** (weight.bits - 1),
        group_size=group,
        outputs=outputs,
        inputs=inputs,
    )


def unpack(packed: PackedWeight) -> Tensor:
    """The codes again, uint8 [N, K]: the inverse of `pack`."""
    words, bits = packed.words, packed.bits
    tiles, units = words.shape[:2]
    codes = words.new_empty((tiles, units, 2, 8, 4, 2, 4, 2), dtype=torch.uint8)  # [.., h, g, piece, c, t, j]
    held = words.view(
        tiles, units, *((1, 8, 4, 4) if bits == 4 else (2, 8, 4, 4))
    )  # [.., plane, g, t, piece]
    for h, c, j in _ELEMENTS:
        plane, shift = (0, 4 * (2 * c + h) + 16 * j) if bits == 4 else (c, 8 * h + 16 * j)
        level = (held[:, :, plane] >> shift) & (2**bits - 1)
        codes[:, :, h, :, :, c, :, j] = level.permute(0, 1, 2, 4, 3).to(torch.uint8)
    rows = codes.permute(0, 2, 3, 1, 4, 5, 6, 7).reshape(tiles * ROWS, units * INPUTS)
    return rows[: packed.outputs, : packed.inputs]


_ELEMENTS = [(h, c, j) for h in range(2) for c in range(2) for j in range(2)]


def _group_size(weight: QuantizedTensor) -> tuple[int, int]:
    """(inputs that share a scale in the kernel, how often each scale is repeated for it); 0: a whole row."""
    group, inputs = weight.group_size, weight.in_features
    if group >= inputs:
        return 0, 1
    if group % GROUPS:
        raise UnsupportedLayout(f"groups of {group} inputs: the Triton kernels take multiples of {GROUPS}")
    return (group, 1) if group % INPUTS == 0 else (GROUPS, group // GROUPS)


def _exact(scales: Tensor) -> Tensor:
    """The narrowest type that holds every scale exactly."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(scales.to(dtype).float(), scales):
            return scales.to(dtype)
    return scales


def _elements(codes: Tensor) -> Tensor:
    """uint8 [rows, inputs] -> int32 [tiles, units, h, g, piece, c, t, j]: the coordinates of a fragment."""
    rows, inputs = codes.shape
    split = codes.view(rows // ROWS, 2, 8, inputs // INPUTS, 4, 2, 4, 2)
    return split.permute(0, 3, 1, 2, 4, 5, 6, 7).to(torch.int32)


def _nibbles(codes: Tensor) -> Tensor:
    """int32 [tiles, units, 128], lanes outermost."""
    parts = _elements(codes)
    words = sum(parts[:, :, h, :, :, c, :, j] << 4 * (2 * c + h) + 16 * j for h, c, j in _ELEMENTS)
    assert isinstance(words, Tensor)  # [tiles, units, g, piece, t]
    return words.permute(0, 1, 2, 4, 3).reshape(*words.shape[:2], 128).contiguous()


def _bytes(codes: Tensor) -> Tensor:
    """int32 [tiles, units, 256], planes outermost, then lanes."""
    parts = _elements(codes)
    planes = []
    for c in range(2):
        words = sum(
            parts[:, :, h, :, :, c, :, j] << 8 * h + 16 * j for h, j in ((0, 0), (1, 0), (0, 1), (1, 1))
        )
        assert isinstance(words, Tensor)
        planes.append(words.permute(0, 1, 2, 4, 3).reshape(*words.shape[:2], 128))
    return torch.cat(planes, dim=2).contiguous()
