"""`DecodeProgram`: a decode step of a model as one compiled call, and its weights for whoever needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble_kernels.numba import frame as at
from nybble_kernels.numba.arena import floats, words
from nybble_kernels.numba.builder import Buffer, ProgramBuilder
from nybble_kernels.numba.compiled import Run
from nybble_kernels.numba.frame import RECORD
from nybble_kernels.numba.weight import HeldWeight
from nybble_kernels.numba.workers import Workers

Ints = NDArray[np.int32] | Tensor
Floats = NDArray[np.float32] | Tensor

STEP, FILL, EMBED, DEQUANTIZE = 0, 1, 2, 3  # programs, in the order of registration
PARTS = 4  # weights that one linear may be stacked from


@dataclass(frozen=True)
class Limits:
    """What a step may be asked: tokens below `vocabulary`, positions below `positions`."""

    vocabulary: int
    positions: int
    kv_bytes: Callable[[int], int]  # of a step at a position


@dataclass(frozen=True, eq=False)
class Written:
    """What a program has beside its ops. linears: by layer and name · embedding: the packed output matrix
    where they are tied, levels of its own, or numbers as stored · filling: ops until the last layer's keys
    and values are written.
    """

    linears: Mapping[tuple[int, str], Sequence[HeldWeight]]
    embedding: Tensor | HeldWeight
    filling: int


class PackedLinear:
    """A projection, or partners stacked, as the program holds it."""

    def __init__(self, program: DecodeProgram, parts: Sequence[HeldWeight]) -> None:
        self._program = program
        self.parts = tuple(parts)

    @property
    def shape(self) -> tuple[int, int]:
        return sum(p.outputs for p in self.parts), self.parts[0].inputs

    def dequantize_into(self, out: Tensor) -> None:
        """float32 [N, K], contiguous: bit for bit what `QuantizedTensor.dequantize` gives each partner."""
        if tuple(out.shape) != self.shape or out.dtype != torch.float32 or not out.is_contiguous():
            raise ValueError(
                f"out must be contiguous float32 {list(self.shape)}, found {out.dtype} {list(out.shape)}"
            )
        self._program.dequantize(self.parts, out)


class DecodeProgram:
    """Calls must come from one thread at a time. The cache `kv` is shared with whoever fills it."""

    def __init__(
        self,
        builder: ProgramBuilder,
        run: Run,
        kv: Tensor,
        written: Written,
        width: int,
        limits: Limits,
    ) -> None:
        threads = builder.arena.threads
        self.isa = builder.kernels.isa.name
        self.max_batch = builder.max_batch
        self.weight_bytes_per_step = dict(builder.bytes)
        self._limits = limits
        self._width = width
        self._kv = kv
        self._builder = builder
        self._frame = words(at.FRAME)
        self._describe(kv, builder.scratch, threads)
        self._workers = Workers(run, self._frame, threads)
        self.threads = self._workers.count + 1
        self._workers.add(builder.ops)
        self._workers.add(builder.ops[: written.filling])
        self._embed = self._embedding_program(written.embedding)
        self._dequantize = self._workers.add([[0] * RECORD] * PARTS)
        self._linears = {place: tuple(parts) for place, parts in written.linears.items()}

    def _describe(self, kv: Tensor, scratch: int, threads: int) -> None:
        if kv.dtype != torch.bfloat16 or kv.dim() != 6 or not kv.is_contiguous():
            raise ValueError(
                "kv must be contiguous bfloat16 [layers, blocks, 2, block_size, kv_heads, head_dim]"
            )
        stride = -(-scratch // 64) * 64
        self._scratch = floats(stride * threads)
        values = {
            at.KV: kv.data_ptr(),
            at.KV_LAYER: 2 * kv.stride(0),
            at.KV_BLOCK: 2 * kv.stride(1),
            at.KV_VALUES: 2 * kv.stride(2),
            at.BLOCK_SIZE: kv.shape[3],
            at.SCRATCH: self._scratch.ctypes.data,
            at.SCRATCH_STRIDE: 4 * stride,
        }
        for word, value in values.items():
            self._frame[word] = value

    def _embedding_program(self, table: Tensor | HeldWeight) -> NDArray[np.int64]:
        one = ProgramBuilder(self._builder.kernels, self._builder.arena, 1)
        one.embed(Buffer(np.empty(0, np.float32), self._width), table, None, 0)
        self._builder.kept.append(one)
        return self._workers.add(one.ops)

    def step(self, tokens: Ints, positions: Ints, tables: Ints, logits: Floats) -> None:
        """Put tokens[b] at positions[b] and write the logits of what follows. Writes the cache.

        tokens, positions: int32 [B] · tables: int32 [B, blocks], position p of row b lies in block
        `tables[b, p // block_size]` · logits: float32 [B, V]. NumPy arrays or CPU tensors, rows contiguous.
        """
        result = _array(logits, np.float32)
        if result.shape != (len(tokens), self._limits.vocabulary):
            raise ValueError(f"logits must be [{len(tokens)}, {self._limits.vocabulary}]")
        self._frame[at.LOGITS], self._frame[at.LOGITS_STRIDE] = result.ctypes.data, result.strides[0]
        self._run(STEP, tokens, positions, tables)

    def fill(self, tokens: Ints, positions: Ints, tables: Ints) -> None:
        """Write the cache as `step` does, and stop there."""
        self._run(FILL, tokens, positions, tables)

    def _run(self, program: int, tokens: Ints, positions: Ints, tables: Ints) -> None:
        token, position = _array(tokens, np.int32), _array(positions, np.int32)
        table = _array(tables, np.int32)
        self._check(token, position, table)
        frame = self._frame
        frame[at.TOKENS], frame[at.POSITIONS] = token.ctypes.data, position.ctypes.data
        frame[at.TABLES], frame[at.TABLE_WIDTH] = table.ctypes.data, table.strides[0] // 4
        self._workers.run(program, len(token))

    def _check(self, tokens: NDArray[Any], positions: NDArray[Any], tables: NDArray[Any]) -> None:
        """Compiled code trusts its arguments."""
        rows = len(tokens)
        if not 1 <= rows <= self.max_batch:
            raise ValueError(f"a step takes 1 to {self.max_batch} tokens, found {rows}")
        if positions.shape != (rows,) or len(tables) != rows:
            raise ValueError(f"positions and tables must have {rows} rows")
        if tokens.min() < 0 or tokens.max() >= self._limits.vocabulary:
            raise ValueError(f"tokens must be in [0, {self._limits.vocabulary})")
        reach = min(self._limits.positions, tables.shape[1] * int(self._frame[at.BLOCK_SIZE]))
        if positions.min() < 0 or positions.max() >= reach:
            raise ValueError(f"positions must be in [0, {reach})")
        if tables.min() < 0 or tables.max() >= self._kv.shape[1]:
            raise ValueError(f"blocks must be in [0, {self._kv.shape[1]})")

    def linear(self, layer: int, name: str) -> PackedLinear:
        """ "qkv", "o", "gate_up" (or "up") or "down" of a layer."""
        return PackedLinear(self, self._linears[layer, name])

    def dequantize(self, parts: Sequence[HeldWeight], out: Tensor) -> None:
        """Each part into its rows of `out`, all threads taking part."""
        ops, start, stride = [], 0, 4 * out.shape[1]
        for part in parts:
            rows = out[start : start + part.outputs]
            op = part.dequantize_record(self._builder.kernels, rows.data_ptr(), stride)
            if op is None:
                rows.copy_(part.dequantize_slowly())
            else:
                ops.append(op)
            start += part.outputs
        if ops:
            self._dequantize[: len(ops)] = ops
            self._workers.set_length(DEQUANTIZE, len(ops))
            self._workers.run(DEQUANTIZE, 1)

    def embedding(self, tokens: Tensor) -> Tensor:
        """int [T] -> float32 [T, D], as the step embeds them (learned positions aside)."""
        chosen = np.ascontiguousarray(tokens.numpy(), dtype=np.int32)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < self._limits.vocabulary:
            raise ValueError(f"tokens must be in [0, {self._limits.vocabulary})")
        out = torch.empty(len(chosen), self._width)
        for start in range(0, len(chosen), 0x8000):
            piece = chosen[start : start + 0x8000]
            self._frame[at.TOKENS] = piece.ctypes.data
            self._embed[0, at.FIRST] = out[start:].data_ptr()
            self._workers.run(EMBED, len(piece))
        return out

    def kv_bytes(self, positions: Sequence[int]) -> int:
        """Bytes of keys and values that a step at these positions reads."""
        return sum(self._limits.kv_bytes(p) for p in positions)


def _array(values: Ints | Floats, dtype: type) -> NDArray[Any]:
    array = values.numpy() if isinstance(values, Tensor) else values
    if array.dtype != dtype or array.strides[-1] != array.itemsize:
        raise ValueError(
            f"expected contiguous rows of {np.dtype(dtype)}, found {array.dtype} {array.strides}"
        )
    return array
