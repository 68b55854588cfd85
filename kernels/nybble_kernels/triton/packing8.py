"""Weights of one byte as `linear_w8a8` reads them: rows side by side, a scale a row, padded with zeros."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from nybble_kernels.float8 import Float8Tensor
from nybble_kernels.quantized import QuantizedTensor
from nybble_kernels.triton.packing import ROW_TILE, UnsupportedLayout

WIDTH = 128  # inputs are padded to whole multiples


@dataclass(frozen=True, eq=False)
class Packed8:
    """W[n, k] = scales[n] · values[n, k], on a device.

    values: int8 or float8_e4m3fn [rows, width], or the bits of the latter as uint8 where x stays at 16 bits,
    as it must on a GPU that does not multiply them · scales: float32 [rows]. rows and width are padded (to 64
    and 128), padding is zero.
    `input_scale`: x is quantized in steps of it; None: by the largest of each row.
    """

    values: Tensor
    scales: Tensor
    outputs: int
    inputs: int
    input_scale: float | None = None

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


def takes_int8(weight: QuantizedTensor) -> bool:
    """Symmetric 8-bit levels with one scale a row."""
    return weight.bits == 8 and weight.symmetric and weight.group_size >= weight.in_features


def pack8(weight: QuantizedTensor, input_scale: float | None = None) -> Packed8:
    """What `takes_int8` allows; raises `UnsupportedLayout` for any other."""
    if not takes_int8(weight):
        raise UnsupportedLayout(f"{weight.describe()}: int8 products take symmetric rows of 8 bits")
    codes = weight.codes
    if weight.permutation is not None:
        codes = codes[:, torch.argsort(weight.permutation)]
    return _padded((codes ^ 0x80).view(torch.int8), weight.scales[:, 0], input_scale)


def pack_float8(
    weight: Float8Tensor, input_scale: float | None = None, *, multiplies: bool = True
) -> Packed8:
    """8-bit floats with one scale a row; `multiplies`: whether x is rounded to such factors too."""
    if not weight.by_row:
        raise UnsupportedLayout(f"{weight.describe()}: float8 products take one scale a row")
    packed = _padded(weight.values.view(torch.int8), weight.scales[:, 0], input_scale)
    held = torch.float8_e4m3fn if multiplies else torch.uint8
    return replace(packed, values=packed.values.view(held))


def _padded(values: Tensor, scales: Tensor, input_scale: float | None) -> Packed8:
    outputs, inputs = values.shape
    rows = -outputs % ROW_TILE
    padded = F.pad(values, (0, -inputs % WIDTH, 0, rows)).contiguous()
    return Packed8(padded, F.pad(scales.float(), (0, rows)).contiguous(), outputs, inputs, input_scale)
