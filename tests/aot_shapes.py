"""Models and their tensors without storage: what the cases of ahead-of-time compilation call ops with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble_kernels.triton.epilogue import Activate, Operand, Residual, Store
from nybble_kernels.triton.packing import PackedWeight
from nybble_kernels.triton.packing8 import Packed8
from nybble_kernels.triton.quantize import QuantizedOperand

META = torch.device("meta")
BATCH, CHUNK = 64, 512  # rows that buffers have room for, tokens of a prompt at a time


@dataclass(frozen=True)
class Model:
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_dim: int = 128

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


LLAMA2_7B = Model(4096, 11008, 32, 32, 32000)
LLAMA3_8B = Model(4096, 14336, 32, 8, 128256)
QWEN2_7B = Model(3584, 18944, 28, 4, 152064)
OPT_7B = Model(4096, 16384, 32, 32, 50272)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def ints(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.int32)


def operand(width: int, dtype: torch.dtype = torch.float16, norm: str | None = None) -> Operand:
    """Written by a kernel of 64 columns a tile."""
    return Operand(meta(CHUNK, width, dtype=dtype), meta(3, -(-width // 64), CHUNK), 64, norm, 1e-5)


def packed(outputs: int, inputs: int, bits: int = 4, group: int = 128, zeros: bool = True) -> PackedWeight:
    groups = inputs // group if group else 1
    return PackedWeight(
        words=ints(outputs // 16, inputs // 64, 32 * bits),
        scales=meta(groups, outputs, dtype=torch.float16),
        zeros=meta(groups, outputs, dtype=torch.uint8) if zeros else None,
        minimums=None,
        order=None,
        bits=bits,
        center=2 ** (bits - 1),
        group_size=group,
        outputs=outputs,
        inputs=inputs,
    )


def bytes_packed(outputs: int, inputs: int, dtype: torch.dtype) -> Packed8:
    return Packed8(meta(outputs, inputs, dtype=dtype), meta(outputs), outputs, inputs)


def quantized(width: int, dtype: torch.dtype, norm: str | None = None) -> QuantizedOperand:
    source = operand(width, norm=norm)
    return QuantizedOperand(meta(CHUNK, width, dtype=dtype), meta(CHUNK), source)


def floats(outputs: int, inputs: int) -> Tensor:
    return meta(outputs, inputs, dtype=torch.float16)


def stored(width: int) -> Store:
    return Store(meta(CHUNK, width))


def residual(width: int, dtype: torch.dtype = torch.float16) -> Residual:
    return Residual(meta(CHUNK, width), operand(width, dtype), meta(width))


def gated(width: int, dtype: torch.dtype = torch.float16) -> Activate:
    return Activate(operand(width, dtype), "silu", gated=True)


def cache(m: Model, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """One layer's, in blocks of 16 positions."""
    kv = meta(4096, 2, 16, m.kv_heads, m.head_dim, dtype=dtype)
    return kv, meta(*kv.shape[:-1]) if dtype.itemsize == 1 else None


def angles(m: Model) -> tuple[Tensor, Tensor]:
    return meta(8192, m.head_dim // 2), meta(8192, m.head_dim // 2)
