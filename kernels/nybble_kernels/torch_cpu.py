"""Linears on PyTorch's own CPU ops: int4 and int8 weights for few rows, dequantize-then-matmul for many.

The portable path: it runs wherever PyTorch does. Shapes: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from nybble_kernels.float8 import Float8Tensor
from nybble_kernels.quantized import QuantizedTensor, Weight

INT4_GROUPS = (32, 64, 128, 256)  # what `_weight_int4pack_mm_for_cpu` takes
INT8_INPUTS = (
    16  # `_weight_int8pack_mm` reads vectors of so many, past the end of a row that has no whole number
)
ROWS = 512  # of a head that are floats at a time: they stay in a cache
ROW_TILE = 16  # float rows come in whole tiles: for a few rows the BLAS picks another summation order
SMALL_ROWS = 16  # above, the int4 op soon costs more than dequantize-then-matmul


class PackedLinear(Protocol):
    """A weight in the layout its kernel reads."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, K] -> [T, N], both float32. Row t depends on `x[t]` only, bit for bit."""
        ...

    def dequantize_into(self, out: Tensor) -> None:
        """Write the weight as float32 [N, K]."""
        ...


@dataclass(frozen=True, eq=False)
class Int4Linear:
    """linear_w4a16: y = x Wᵀ with 4-bit groups and bfloat16 activations, on `_weight_int4pack_mm_for_cpu`.

    The op means w = (code - 8) · scale + zero with bfloat16 scale and zero, so float16 scales are rounded
    once more here; `dequantize_into` gives what the op computes with.
    """

    packed: Tensor
    codes: Tensor  # uint8 [N, K]: the op's layout cannot be read back
    scales_and_zeros: Tensor  # bfloat16 [K / g, N, 2]
    group_size: int

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales_and_zeros.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] > SMALL_ROWS:
            weight = torch.empty(self.codes.shape)
            self.dequantize_into(weight)
            return F.linear(x, weight)
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.bfloat16(), self.packed, self.group_size, self.scales_and_zeros
        )
        return y.float()

    def dequantize_into(self, out: Tensor) -> None:
        groups = out.view(out.shape[0], -1, self.group_size)
        scales, zeros = self.scales_and_zeros.float().permute(2, 1, 0).unsqueeze(-1)
        groups.copy_(self.codes.view_as(groups))
        groups.sub_(8).mul_(scales).add_(zeros)


@dataclass(frozen=True, eq=False)
class Int8Linear:
    """linear_w8a16: int8 weights with one bfloat16 scale a row, on `_weight_int8pack_mm`."""

    codes: Tensor  # int8 [N, K]
    scales: Tensor  # bfloat16 [N]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x.bfloat16(), self.codes, self.scales)
        return y.float()

    def dequantize_into(self, out: Tensor) -> None:
        out.copy_(self.codes).mul_(self.scales.float()[:, None])


@dataclass(frozen=True, eq=False)
class FloatLinear:
    """An unquantized weight, or one whose shape no integer op takes, as it was stored."""

    weight: Tensor  # [N, K]

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        x = F.pad(x, (0, 0, 0, -rows % ROW_TILE))
        return F.linear(x, self.weight.float())[:rows]

    def dequantize_into(self, out: Tensor) -> None:
        out.copy_(self.weight)


def pack(weight: Weight) -> PackedLinear:
    """The fastest of the three that holds the weight."""
    if isinstance(weight, Tensor):
        return FloatLinear(weight)
    if isinstance(weight, Float8Tensor):
        return FloatLinear(weight.dequantize(torch.bfloat16))
    if _takes_int4(weight):
        return _pack_int4(weight)
    if _takes_int8(weight):
        return Int8Linear(
            (weight.codes.to(torch.int16) - 128).to(torch.int8).contiguous(), weight.scales[:, 0].bfloat16()
        )
    return FloatLinear(weight.dequantize(torch.bfloat16))


def _takes_int4(weight: QuantizedTensor) -> bool:
    grouped = weight.group_size in INT4_GROUPS and weight.in_features % weight.group_size == 0
    return weight.bits == 4 and grouped and weight.out_features % 16 == 0 and weight.permutation is None


def _takes_int8(weight: QuantizedTensor) -> bool:
    by_row = weight.scales.shape[1] == 1 and weight.in_features % INT8_INPUTS == 0
    return weight.bits == 8 and weight.symmetric and by_row and weight.permutation is None


def _pack_int4(weight: QuantizedTensor) -> Int4Linear:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.to(torch.int32), 1)
    zeros = weight.offsets() + 8 * weight.scales
    both = torch.stack([weight.scales, zeros], dim=-1)  # [N, G, 2]
    return Int4Linear(packed, weight.codes, both.transpose(0, 1).contiguous().bfloat16(), weight.group_size)


def quantize_rows(weight: Tensor, group_size: int | None = None) -> QuantizedTensor:
    """Symmetric int8 with one scale a row (or a group): scale = max|w| / 127, codes rounded to nearest.

    Scales are float16 numbers where all of them are in its normal range. Head matrices are held this way: at
    8 bits a row the error is below that of bfloat16 activations.
    """
    group = group_size or weight.shape[1]
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    largest = [rows.float().view(len(rows), -1, group).abs().amax(-1) for rows in torch.split(weight, ROWS)]
    scales = torch.cat(largest).div_(127)
    half = torch.finfo(torch.float16)
    if bool(((scales == 0) | ((scales >= half.tiny) & (scales <= half.max))).all()):
        scales = scales.clamp_min_(half.tiny).half().float()
    scales.clamp_min_(1e-12)
    pieces = (torch.split(tensor, ROWS) for tensor in (weight, codes, scales))
    for rows, target, scale in zip(*pieces, strict=True):
        groups = rows.float().unflatten(1, (-1, group))  # [n, G, g]
        target.copy_((groups / scale.unsqueeze(-1)).round_().clamp_(-127, 127).add_(128).flatten(1))
    return QuantizedTensor(codes, scales, 8, group)
