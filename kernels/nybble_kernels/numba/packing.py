"""`QuantizedTensor` to packed blocks and back. Every kind of quantized tensor has an exact packed form.

Codes are stored in as many bits as they have. Where the groups are not
whole sub-groups of 32 inputs, or the columns are permuted, inputs are rearranged: packed column c reads input
`columns[c]`, or nothing (a zero) where that is -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nybble_kernels.numba.arena import Arena, Room
from nybble_kernels.numba.layout import ROWS, STREAMS, SUB, Format
from nybble_kernels.quantized import QuantizedTensor

PIECE = 64 * ROWS * STREAMS  # rows that are packed at a time


@dataclass(frozen=True, eq=False)
class Packed:
    """A quantized weight [outputs, inputs] in blocks of 16 rows; the last one is filled up with zero scales.

    room: its blocks, form.block_bytes(groups, subs) each · columns: int32 [groups * subs * 32], or None when
    packed columns are the inputs in order · the rest: what the tensor was.
    """

    room: Room
    form: Format
    outputs: int
    inputs: int
    groups: int
    subs: int
    columns: Tensor | None
    bits: int
    group_size: int
    permutation: Tensor | None

    @property
    def width(self) -> int:
        """Inputs as stored, the filling included."""
        return self.groups * self.subs * SUB


def pack(weight: QuantizedTensor, arena: Arena | None = None) -> Packed:
    """Lossless: `unpack(pack(w))` has the values of `w`. Some rows at a time: on the way they take memory."""
    group = min(weight.group_size, weight.in_features)
    groups = weight.scales.shape[1]
    subs = -(-group // SUB)
    form = _format(weight)
    places = _columns_of_codes(weight, groups, group, subs)
    blocks, size = -(-weight.out_features // ROWS), form.block_bytes(groups, subs)
    room = (arena or Arena(blocks * size)).room(blocks, size)
    for first in range(0, weight.out_features, PIECE):
        rows = weight.rows(first, first + PIECE)
        room.fill(first // ROWS, _blocks(rows, form, _spread(rows.codes, places), size))
    return Packed(
        room,
        form,
        *weight.shape,
        groups,
        subs,
        _columns(weight, places),
        weight.bits,
        weight.group_size,
        weight.permutation,
    )


def _blocks(rows: QuantizedTensor, form: Format, codes: Tensor, size: int) -> Tensor:
    """uint8 [blocks, size]."""
    blocks = -(-rows.out_features // ROWS)
    parts = (_pack_codes(codes, form, blocks), *_pack_groups(rows, form, blocks))
    data = torch.cat([p.reshape(blocks, -1) for p in parts], dim=1)
    return F.pad(data, (0, size - data.shape[1]))


def unpack(packed: Packed) -> QuantizedTensor:
    """What was packed."""
    form, rows = packed.form, packed.outputs
    data = packed.room.stored()
    sizes = [packed.groups * n for n in (packed.subs * form.sub_bytes, form.scale_bytes, form.offset_bytes)]
    codes, scales, offsets, _ = torch.split(data, [*sizes, data.shape[1] - sum(sizes)], dim=1)
    spread = _unpack_codes(codes.contiguous(), form, packed)[:rows]
    group = min(packed.group_size, packed.inputs)
    places = _places(packed.inputs, group, packed.subs)
    real = _reals(scales, form)[:rows]
    zeros = minimums = None
    if form.offsets == "minimum":
        minimums = _reals(offsets, form)[:rows]
    elif form.offsets == "zero":
        zeros = _by_row(offsets.reshape(-1, packed.groups, ROWS))[:rows]
    return QuantizedTensor(
        spread[:, places].contiguous(),
        real,
        packed.bits,
        packed.group_size,
        zeros,
        minimums,
        packed.permutation,
    )


def _format(weight: QuantizedTensor) -> Format:
    reals = [weight.scales] if weight.minimums is None else [weight.scales, weight.minimums]
    half = all(torch.equal(r.half().float(), r.float()) for r in reals)
    if weight.minimums is not None:
        return Format(weight.bits, half, "minimum")
    return Format(weight.bits, half, "none" if weight.zeros is None else "zero")


def _places(inputs: int, group: int, subs: int) -> Tensor:
    """int64 [inputs]: the packed column of each code column."""
    k = torch.arange(inputs)
    return k // group * (subs * SUB) + k % group


def _columns_of_codes(weight: QuantizedTensor, groups: int, group: int, subs: int) -> Tensor:
    """int64 [width]: the code column in each packed column, -1 in the filling."""
    columns = torch.full((groups * subs * SUB,), -1)
    columns[_places(weight.in_features, group, subs)] = torch.arange(weight.in_features)
    return columns


def _columns(weight: QuantizedTensor, columns: Tensor) -> Tensor | None:
    if weight.permutation is not None:
        columns = torch.where(columns >= 0, weight.permutation[columns.clamp(min=0)], -1)
    in_order = len(columns) == weight.in_features and torch.equal(columns, torch.arange(len(columns)))
    return None if in_order else columns.int()


def _spread(codes: Tensor, columns: Tensor) -> Tensor:
    if len(columns) == codes.shape[1] and int(columns.min()) >= 0:
        return codes
    return torch.where(columns >= 0, codes[:, columns.clamp(min=0)], 0).to(torch.uint8)


def _pack_codes(codes: Tensor, form: Format, blocks: int) -> Tensor:
    """uint8 [N, width] -> [blocks, sub-groups, words, 16 rows x 4 bytes]."""
    rows = _rows(codes, blocks)
    words = rows.view(torch.int32).reshape(blocks, ROWS, -1, 8)
    if form.bits == 8:
        words = words ^ -0x7F7F7F80
    else:
        words = torch.cat([_plane(words, *plane) for plane in form.planes], dim=3)
    return words.permute(0, 2, 3, 1).contiguous().view(torch.uint8)


def _plane(words: Tensor, width: int, low: int) -> Tensor:
    """int32 [..., 8] of four codes each -> [..., width]: `width` bits of every code, from bit `low` on."""
    part = ((words >> low) & (0x01010101 * (2**width - 1))).unflatten(-1, (width, 8 // width))
    plane: Tensor = part[..., 0]
    for number in range(1, 8 // width):
        plane |= part[..., number] << (width * number)
    return plane


def _unpack_codes(data: Tensor, form: Format, packed: Packed) -> Tensor:
    words = data.reshape(len(data), packed.groups * packed.subs, -1, ROWS, 4)
    if form.bits == 8:
        codes = words ^ 0x80
    else:
        codes = torch.zeros(*words.shape[:2], 8, *words.shape[3:], dtype=torch.uint8)
        parts = torch.split(words, [width for width, _ in form.planes], dim=2)
        for (width, low), part in zip(form.planes, parts, strict=True):
            values = (part.unsqueeze(3) >> _places_in_byte(width)) & (2**width - 1)
            codes |= values.flatten(2, 3) << low
    return codes.permute(0, 3, 1, 2, 4).reshape(-1, packed.width)


def _places_in_byte(width: int) -> Tensor:
    """Where each of the words that share one lies: uint8 [8 / width, 1, 1]."""
    return torch.arange(0, 8, width, dtype=torch.uint8)[:, None, None]


def _pack_groups(weight: QuantizedTensor, form: Format, blocks: int) -> tuple[Tensor, Tensor]:
    """Scales and offsets, [blocks, groups, 16 rows] as bytes."""
    dtype = torch.float16 if form.half else torch.float32

    def reals(values: Tensor) -> Tensor:
        return _by_group(_rows(values.to(dtype), blocks)).view(torch.uint8)

    if weight.minimums is not None:
        return reals(weight.scales), reals(weight.minimums)
    if weight.zeros is None:
        return reals(weight.scales), torch.empty(blocks, 0, dtype=torch.uint8)
    return reals(weight.scales), _by_group(_rows(weight.zeros.to(torch.uint8), blocks))


def _reals(data: Tensor, form: Format) -> Tensor:
    values = data.contiguous().view(torch.float16 if form.half else torch.float32)
    return _by_row(values.reshape(data.shape[0], -1, ROWS)).float()


def _by_group(values: Tensor) -> Tensor:
    return values.reshape(-1, ROWS, values.shape[1]).transpose(1, 2).contiguous()


def _by_row(values: Tensor) -> Tensor:
    return values.transpose(1, 2).reshape(-1, values.shape[1]).contiguous()


def _rows(values: Tensor, blocks: int) -> Tensor:
    """Zero rows up to whole blocks."""
    missing = blocks * ROWS - values.shape[0]
    return torch.cat((values, values.new_zeros(missing, values.shape[1]))) if missing else values
