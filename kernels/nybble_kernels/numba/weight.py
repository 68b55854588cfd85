"""A weight as a program holds it: packed inside the arena, with what the ops need to know to read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from nybble_kernels.numba.arena import Arena, fill
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
        return self.packed.data.numel()

    def gemv_record(self, kernels: Kernels, place: Sequence[int]) -> list[int]:
        addresses = [kernels.gemv(self.packed.form, tile) for tile in TILES]
        return _gemv(self.packed.data, addresses, place, self.outputs, (self.packed.groups, self.packed.subs))

    def dequantize_record(self, kernels: Kernels, out: int, stride: int) -> list[int] | None:
        if self.columns is not None:
            return None
        kernel = kernels.dequantize(self.packed.form)
        start, sizes = self.packed.data.data_ptr(), (self.packed.groups, self.packed.subs)
        arguments = (start, *places(self.packed.data), kernel, out, stride, self.outputs, *sizes)
        return record(Code.DEQUANTIZE, *arguments, fixed=self.packed.blocks, chunk=4)

    def dequantize_slowly(self) -> Tensor:
        return unpack(self.packed).dequantize()


@dataclass(frozen=True, eq=False)
class FloatWeight:
    """data: uint8 [blocks / 4, 4, bytes]; a block is bfloat16 [inputs, 16 rows]."""

    data: Tensor
    outputs: int
    inputs: int
    columns: Tensor | None = None
    integer: bool = False

    @property
    def width(self) -> int:
        return self.inputs

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    def gemv_record(self, kernels: Kernels, place: Sequence[int]) -> list[int]:
        addresses = [kernels[float_name(tile)] for tile in TILES]
        return _gemv(self.data, addresses, place, self.outputs, (self.inputs, 1))

    def dequantize_record(self, kernels: Kernels, out: int, stride: int) -> list[int] | None:
        return None

    def dequantize_slowly(self) -> Tensor:
        blocks = self.data.flatten(0, 1)[:, : 2 * ROWS * self.inputs].contiguous().view(torch.bfloat16)
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
    data = arena.room(-(-outputs // ROWS), size)
    for first in range(0, outputs, PIECE):
        stop = first + PIECE
        rows = weight[first:stop] if isinstance(weight, Tensor) else weight.rows(first, stop)
        values = dense(rows, torch.bfloat16)
        values = F.pad(values, (0, 0, 0, -len(values) % ROWS)).view(-1, ROWS, inputs)
        columns = values.transpose(1, 2).flatten(1).view(torch.uint8)
        fill(data, first // ROWS, F.pad(columns, (0, size - columns.shape[1])))
    return FloatWeight(data, outputs, inputs)


def packed_bound(weight: Weight) -> int:
    """At most this many bytes of arena."""
    outputs, inputs = shape_of(weight)
    blocks = -(-outputs // (ROWS * STREAMS)) * STREAMS
    if not isinstance(weight, QuantizedTensor):
        return blocks * aligned(2 * ROWS * inputs)
    groups = weight.scales.shape[1]
    subs = -(-min(weight.group_size, inputs) // SUB)
    widest = Format(weight.bits, half=False, minimum=True)
    return blocks * widest.block_bytes(groups, subs)


def places(data: Tensor) -> tuple[int, int]:
    """Bytes from block to block of a stream, and from stream to stream."""
    return data.stride(0), data.stride(1)


def _gemv(
    data: Tensor,
    kernels: Sequence[int],
    place: Sequence[int],
    outputs: int,
    sizes: tuple[int, int],
) -> list[int]:
    x, x_stride, y, y_stride, bias, residual = place
    fours = data.shape[0]
    arguments = (
        data.data_ptr(),
        *places(data),
        *kernels,
        x,
        x_stride,
        y,
        y_stride,
        outputs,
        bias,
        residual,
        *sizes,
    )
    return record(Code.GEMV, *arguments, fixed=fours, chunk=chunk_of(fours))


def chunk_of(fours: int) -> int:
    """Fours of blocks a thread takes at a time: an eighth of the op, so that a late thread costs little."""
    return max(1, min(fours // 8, 16))
