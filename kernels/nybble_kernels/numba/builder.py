"""Write a program: ops one after another over buffers, weights packed in the order in which they run."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble_kernels.numba import quantize_kernel
from nybble_kernels.numba.activation import KINDS
from nybble_kernels.numba.arena import Arena, floats
from nybble_kernels.numba.attention import PARTS, SHORTEST
from nybble_kernels.numba.attention_kernels import scores_name, shape_for, values_name
from nybble_kernels.numba.embed import BFLOAT, FLOAT, PACKED
from nybble_kernels.numba.frame import Code, record
from nybble_kernels.numba.layout import ROWS, STREAMS, TILES, activation_bytes, aligned
from nybble_kernels.numba.machine import Kernels
from nybble_kernels.numba.weight import HeldWeight, QuantizedWeight, hold
from nybble_kernels.quantized import Weight


@dataclass(frozen=True, eq=False)
class Buffer:
    """float32 [max_batch, width]."""

    values: NDArray[np.float32]
    width: int

    @property
    def address(self) -> int:
        return int(self.values.ctypes.data)

    @property
    def stride(self) -> int:
        return 4 * self.width


LOGITS = Buffer(np.empty(0, np.float32), 0)
"""Stands for the logits that the caller of a step passes."""


@dataclass(frozen=True)
class Attention:
    """The shape of attention. cos, sin: float32 [positions, head_dim / 2], or None."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    cos: Tensor | None = None
    sin: Tensor | None = None


class ProgramBuilder:
    """Collects ops. Whatever an op points to is kept alive in `kept`."""

    def __init__(self, kernels: Kernels, arena: Arena, max_batch: int) -> None:
        self.kernels = kernels
        self.arena = arena
        self.max_batch = max_batch
        self.ops: list[list[int]] = []
        self.kept: list[object] = [arena]
        self.bytes: dict[str, int] = {}
        self.scratch = (
            TILES[0] * ROWS * STREAMS
        )  # floats that one thread needs: a tile of outputs, a gathered row, or scores
        self._shared: dict[int, int] = {}
        self._integers: dict[tuple[int, int, bytes], tuple[int, int]] = {}

    def buffer(self, width: int) -> Buffer:
        return Buffer(self._floats(width), width)

    def embed(self, x: Buffer, table: Tensor | HeldWeight, positions: Tensor | None, offset: int) -> None:
        """x = table[token] (+ positions[position + offset])."""
        place = 0 if positions is None else self._constant(positions)
        kind, address, *packed = self._table(table)
        self.ops.append(
            record(Code.EMBED, x.address, x.width, kind, address, *packed, place, offset, per_row=1)
        )
        self._changed(x)

    def norm(
        self, x: Buffer, y: Buffer, weight: Tensor, bias: Tensor | None, eps: float, layer_norm: bool
    ) -> None:
        held = self._constant(weight), 0 if bias is None else self._constant(bias)
        self.count("norm", 4 * x.width * (1 if bias is None else 2))
        self.ops.append(
            record(Code.NORM, x.address, y.address, x.width, *held, bits_of(eps), int(layer_norm), per_row=1)
        )
        self._changed(y)

    def linear(
        self,
        x: Buffer,
        y: Buffer,
        weight: Weight | HeldWeight,
        bias: Tensor | None = None,
        *,
        column: int = 0,
        residual: bool = False,
        kind: str = "linear",
    ) -> HeldWeight:
        """y[:, column : column + outputs] = x Wᵀ + bias (+ y)."""
        held = hold(weight, self.arena) if isinstance(weight, Weight) else weight
        source = self._integer(x, held) if held.integer else (x.address, x.stride)
        target = (0, 0) if y is LOGITS else (y.address + 4 * column, y.stride)
        offset = 0 if bias is None else self._constant(bias)
        self.ops.append(held.gemv_record(self.kernels, (*source, *target, offset, int(residual))))
        self.count(kind, held.nbytes + (0 if bias is None else 4 * held.outputs))
        self._changed(y)
        return held

    def place(
        self,
        qkv: Buffer,
        shape: Attention,
        layer: int,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> None:
        """Normalise and rotate q and k; write k and v of the new position into the cache."""
        tables = [0 if t is None else self._constant(t) for t in (shape.cos, shape.sin, q_norm, k_norm)]
        self.count("norm", sum(4 * t.numel() for t in (q_norm, k_norm) if t is not None))
        sizes = shape.heads, shape.kv_heads, shape.head_dim
        self.ops.append(
            record(Code.PLACE, qkv.address, qkv.stride, *sizes, *tables, bits_of(eps), layer, per_row=1)
        )
        self._changed(qkv)

    def attend(
        self,
        qkv: Buffer,
        out: Buffer,
        shape: Attention,
        layer: int,
        window: int | None,
        length: int,
        page: int,
    ) -> None:
        """out = attention of the new position over at most `length`, in blocks of `page` positions."""
        part = max(SHORTEST, -(-length // PARTS)) + 2 * page  # positions, at most
        self.scratch = max(self.scratch, part * shape.heads)
        lanes, vectors, together = shape_for(shape.head_dim, shape.heads // shape.kv_heads)
        kernels = (
            self.kernels[scores_name(lanes, together)],
            self.kernels[values_name(lanes, vectors, together)],
        )
        sizes = shape.heads, shape.kv_heads, shape.head_dim
        scale, parts = bits_of(shape.scale), self._parts(shape)
        tail = layer, window or 0, scale, *kernels
        threads = self.arena.threads
        chunk = max(n for n in (1, 2, 4, PARTS) if n * threads <= max(PARTS, threads))
        place = qkv.address, qkv.stride, parts
        self.ops.append(record(Code.ATTEND, *place, *sizes, *tail, per_row=PARTS, chunk=chunk))
        merge = parts, out.address, shape.heads, shape.head_dim, scale
        self.ops.append(record(Code.MERGE, *merge, per_row=1))
        self._changed(out)

    def _parts(self, shape: Attention) -> int:
        """Address of what attention leaves between its two ops, shared by all layers."""
        width = PARTS * shape.heads * (shape.head_dim + 2)
        if width not in self._shared:
            self._shared[width] = int(self._floats(width).ctypes.data)
        return self._shared[width]

    def activate(self, x: Buffer, y: Buffer, kind: str, gated: bool) -> None:
        """y = act(x), or act(first half of x) * second half."""
        self.ops.append(
            record(Code.ACTIVATE, x.address, x.stride, y.address, y.width, KINDS[kind], int(gated), per_row=1)
        )
        self._changed(y)

    def count(self, kind: str, size: int) -> None:
        self.bytes[kind] = self.bytes.get(kind, 0) + size

    def _integer(self, x: Buffer, weight: HeldWeight) -> tuple[int, int]:
        """Address and stride of x as int8, arranged as the weight reads it; made once until x changes."""
        columns = weight.columns
        key = x.address, weight.width, b"" if columns is None else columns.numpy().tobytes()
        if key not in self._integers:
            stride = aligned(activation_bytes(weight.width))
            target = int(self._floats(stride // 4).ctypes.data)
            if columns is not None:
                self.scratch = max(self.scratch, weight.width)
                self.kept.append(columns)
            self.ops.append(quantize_record(self.kernels, weight, (x.address, x.stride, target, stride)))
            self._integers[key] = target, stride
        return self._integers[key]

    def _changed(self, y: Buffer) -> None:
        self._integers = {k: v for k, v in self._integers.items() if k[0] != y.address}

    def _table(self, table: Tensor | HeldWeight) -> tuple[int, ...]:
        """Kind, place, kernel, groups and subs of an embedding."""
        if isinstance(table, QuantizedWeight) and table.columns is None:
            form, sizes = table.packed.form, (table.packed.groups, table.packed.subs)
            kernel = self.kernels.dequantize(form)
            return PACKED, *table.packed.room.place, kernel, *sizes
        values = table if isinstance(table, Tensor) else table.dequantize_slowly()
        values = values.contiguous() if values.dtype == torch.bfloat16 else values.float().contiguous()
        self.kept.append(values)
        return BFLOAT if values.dtype == torch.bfloat16 else FLOAT, values.data_ptr(), 0, 0, 0, 0, 0, 0

    def _constant(self, values: Tensor) -> int:
        """Address of the values as float32."""
        held = values.detach().float().contiguous()
        self.kept.append(held)
        return held.data_ptr()

    def _floats(self, width: int) -> NDArray[np.float32]:
        values = floats(self.max_batch * width)
        self.kept.append(values)
        return values


def quantize_record(kernels: Kernels, weight: HeldWeight, place: Sequence[int]) -> list[int]:
    """Activations as the weight reads them. `place`: x, bytes between rows, target, bytes between rows."""
    columns = 0 if weight.columns is None else weight.columns.data_ptr()
    kernel = kernels[quantize_kernel.NAME]
    return record(Code.QUANTIZE, *place, weight.width, columns, kernel, per_row=1)


def bits_of(value: float) -> int:
    """The bits of a float32 as an integer."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])
