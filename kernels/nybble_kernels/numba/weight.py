"""A weight as a program holds it: packed inside the arena, with what the ops need to know to read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from nybble_kernels.numba.arena import Arena, Room
from nybble_kernels.numba.frame import Code, record
from nybble_kernels.numba.gemv_float import float_name
from nybble_kernels.numba.layout import ROWS, STREAMS, SUB, TILES, Format, aligned
from nybble_kernels.numba.machine import Kernels
from nybble_kernels.numba.packing import PIECE, Packed, pack, unpack
from nybble_kernels.quantized import QuantizedTensor, Weight, dense, shape_of


class HeldWeight(Protocol):
    @property
    def outputs(self) -> int: ...
    @property
    def inputs(self) -> int: ...
    @property
    def nbytes(self) -> int:
        """That a step reads."""
        ...

    @property
    def columns(self) -> Tensor | None:
        """int32: which input each packed column reads."""
        ...

    @property
    def width(self) -> int:
        """Packed columns."""
        ...

    @property
    def integer(self) -> bool:
        """Whether it reads int8 activations."""
        ...

    def gemv_record(self, kernels: Kernels, place: Sequence[int]) -> list[int]:
        """`place`: x, bytes between rows, y, bytes between rows, bias or 0, residual."""
        ...

    def dequantize_record(self, kernels: Kernels, out: int, stride: int) -> list[int] | None:
        """None when only `dequantize_slowly` can."""
        ...

    def dequantize_slowly(self) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    packed: Packed
    integer: bool = True

    @property
    def outputs(self) -> int:
        return self.packed.outputs

    @property
    def inputs(self) -> int:
        return self.packed.inputs

    @property
    def width(self) -> int:
        return self.packed.width

    @property
    def columns(self) -> Tensor | None:
        return self.packed.columns

    @property
    def nbytes(self) -> int:
        return self.packed.room.nbytes

    def gemv_record(self, kernels: Kernels, place: Sequence[int]) -> list[int]:
        form, sizes = self.packed.form, (self.packed.groups, self.packed.subs)
        addresses = [*(kernels.gemv(form, tile) for tile in TILES), kernels.gemv(form, 1, blocks=2)]
        return _gemv(self.packed.room, addresses, place, self.outputs, sizes)

    def dequantize_record(self, kernels: Kernels, out: int, stride: int) -> list[int] | None:
        if self.columns is not None:
            return None
        kernel = kernels.dequantize(self.packed.form)
        sizes = self.packed.groups, self.packed.subs
        arguments = (*self.packed.room.place, kernel, out, stride, self.outputs, *sizes)
        return record(Code.DEQUANTIZE, *arguments, fixed=self.packed.room.blocks, chunk=4)

    def dequantize_slowly(self) -> Tensor:
        return unpack(self.packed).dequantize()


@dataclass(frozen=True, eq=False)
class FloatWeight:
    """room: blocks of bfloat16 [inputs, 16 rows]."""

    room: Room
    outputs: int
    inputs: int
    columns: Tensor | None = None
    integer: bool = False

    @property
    def width(self) -> int:
        return self.inputs

    @property
    def nbytes(self) -> int:
        return self.room.nbytes

    def gemv_record(self, kernels: Kernels, place: Sequence[int]) -> list[int]:
        addresses = [*(kernels[float_name(tile)] for tile in TILES), 0]
        return _gemv(self.room, addresses, place, self.outputs, (self.inputs, 1))

    def dequantize_record(self, kernels: Kernels, out: int, stride: int) -> list[int] | None:
        return None

    def dequantize_slowly(self) -> Tensor:
        blocks = self.room.stored()[:, : 2 * ROWS * self.inputs].contiguous().view(torch.bfloat16)
        return (
            blocks.view(-1, self.inputs, ROWS)
            .transpose(1, 2)
            .reshape(-1, self.inputs)[: self.outputs]
            .float()
        )


def hold(weight: Weight, arena: Arena) -> QuantizedWeight | FloatWeight:
    """Pack a weight into the arena; 8-bit floats as bfloat16, for which there is a product."""
    if isinstance(weight, QuantizedTensor):
        return QuantizedWeight(pack(weight, arena))
    outputs, inputs = weight.shape
    size = aligned(2 * ROWS * inputs)
    room = arena.room(-(-outputs // ROWS), size)
    for first in range(0, outputs, PIECE):
        stop = first + PIECE
        rows = weight[first:stop] if isinstance(weight, Tensor) else weight.rows(first, stop)
        values = dense(rows, torch.bfloat16)
        values = F.pad(values, (0, 0, 0, -len(values) % ROWS)).view(-1, ROWS, inputs)
        columns = values.transpose(1, 2).flatten(1).view(torch.uint8)
        room.fill(first // ROWS, F.pad(columns, (0, size - columns.shape[1])))
    return FloatWeight(room, outputs, inputs)


def packed_bound(weight: Weight, threads: int = 1) -> int:
    """At most this many bytes of an arena for so many threads."""
    outputs, inputs = shape_of(weight)
    share = 2 * -(-outputs // (2 * ROWS * threads))
    blocks = threads * -(-share // STREAMS) * STREAMS
    if not isinstance(weight, QuantizedTensor):
        return blocks * aligned(2 * ROWS * inputs)
    groups = weight.scales.shape[1]
    subs = -(-min(weight.group_size, inputs) // SUB)
    widest = Format(weight.bits, half=False, offsets="minimum")
    return blocks * widest.block_bytes(groups, subs)


def _gemv(
    room: Room, kernels: Sequence[int], place: Sequence[int], outputs: int, sizes: tuple[int, int]
) -> list[int]:
    """kernels: one for each of TILES, then one row by two blocks, or 0."""
    threads, fours = room.data.shape[:2]
    arguments = *room.place, *kernels, *place, outputs, *sizes
    return record(
        Code.GEMV, *arguments, fixed=threads * fours, chunk=max(1, min(fours // 4, 16)), shares=threads
    )
