"""Any weight as a linear on the device: packed for the kernel that reads it, with the norm before it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from nybble_kernels.activations import Activations
from nybble_kernels.float8 import Float8Tensor
from nybble_kernels.quantized import Weight, dense, shape_of
from nybble_kernels.triton.epilogue import Operand, Output
from nybble_kernels.triton.linear_f16 import linear_f16
from nybble_kernels.triton.linear_w4a16 import linear_w4a16
from nybble_kernels.triton.linear_w8a8 import linear_w8a8
from nybble_kernels.triton.packing import PackedWeight, UnsupportedLayout, pack
from nybble_kernels.triton.packing8 import Packed8, pack8, pack_float8, takes_int8
from nybble_kernels.triton.quantize import QuantizedOperand
from nybble_kernels.triton.tiles import Cut, Phase, Tile, Tuning, Workspace

Packed = PackedWeight | Packed8 | Tensor


@dataclass(frozen=True, eq=False)
class FoldedNorm:
    """A LayerNorm's weight and bias: W (x̂ ∘ w + b) needs Σₖ W w and W b (see `epilogue`)."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class DeviceLinear:
    """y = x Wᵀ + b; call it with an operand and an output."""

    weight: Packed
    outputs: int
    inputs: int
    cuts: dict[Phase, Cut]
    bias: Tensor | None = None
    colsum: Tensor | None = None
    kind: str = ""

    @property
    def nbytes(self) -> int:
        """What one launch reads of it."""
        return self.weight.nbytes + sum(t.nbytes for t in (self.bias, self.colsum) if t is not None)

    @property
    def quantizes(self) -> bool:
        """Whether it multiplies inputs of 8 bits."""
        return self.input_dtype is not None

    @property
    def input_dtype(self) -> torch.dtype | None:
        """Of inputs that are rounded to 8 bits: int8 or float8_e4m3fn."""
        if not isinstance(self.weight, Packed8) or self.weight.values.dtype == torch.uint8:
            return None
        return self.weight.values.dtype

    @property
    def input_scale(self) -> float | None:
        """The step of rounded inputs, where calibration fixed one."""
        return self.weight.input_scale if isinstance(self.weight, Packed8) else None

    @property
    def device(self) -> torch.device:
        weight = self.weight
        return weight.device if isinstance(weight, Tensor) else weight.scales.device

    def copy(self) -> DeviceLinear:
        """The same values at other addresses."""
        return replace(self, weight=_copied(self.weight))

    def tile(self, rows: int, phase: Phase) -> Tile:
        return self.cuts[phase].tile(rows, phase)

    def __call__(
        self,
        operand: Operand | QuantizedOperand,
        rows: int,
        output: Output,
        phase: Phase,
        workspace: Workspace,
        *,
        pdl: bool = False,
    ) -> None:
        weight, tile = self.weight, self.tile(rows, phase)
        bias, colsum = self.bias, self.colsum
        if isinstance(weight, Packed8):
            linear_w8a8(operand, rows, weight, output, tile, workspace, bias=bias, colsum=colsum, pdl=pdl)
            return
        assert isinstance(operand, Operand), "only 8-bit products take quantized inputs"
        if isinstance(weight, Tensor):
            linear_f16(operand, rows, weight, output, tile, workspace, bias=bias, colsum=colsum, pdl=pdl)
        else:
            linear_w4a16(operand, rows, weight, output, tile, workspace, bias=bias, colsum=colsum, pdl=pdl)


def make_linear(
    weight: Weight,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
    tuning: Tuning,
    norm: FoldedNorm | None = None,
    inputs: Activations | None = None,
) -> DeviceLinear:
    """Pack a weight on the device where it lies; a layout that no kernel reads is kept as `dtype` values.

    `inputs`: to what x is rounded, where there is a product of such factors. Behind a LayerNorm that is x
    before mean and bias are taken into account, so a static scale, of what comes after, makes way for one a
    row.
    """
    outputs, width = shape_of(weight)
    colsum = None
    if norm is not None:
        if inputs is not None:
            inputs = replace(inputs, scale=None)
        values = dense(weight)
        colsum = values @ norm.weight.float()
        if norm.bias is not None:
            shift = values @ norm.bias.float()
            bias = shift if bias is None else bias.float() + shift
    kind, packed = _pack(weight, dtype, inputs)
    cuts: dict[Phase, Cut] = {p: tuning.cut(kind, outputs, width, p) for p in ("decode", "prefill")}
    return DeviceLinear(
        packed, outputs, width, cuts, None if bias is None else bias.float().contiguous(), colsum, kind
    )


def _copied(weight: Packed) -> Packed:
    if isinstance(weight, Tensor):
        return weight.clone()
    held = {f.name: getattr(weight, f.name) for f in fields(weight)}
    copied: dict[str, Any] = {name: v.clone() for name, v in held.items() if isinstance(v, Tensor)}
    return replace(weight, **copied)


def _pack(weight: Weight, dtype: torch.dtype, inputs: Activations | None) -> tuple[str, Packed]:
    """(kind of product, what it reads)."""
    if isinstance(weight, Tensor):
        return "f16", weight.to(dtype).contiguous()
    try:
        if isinstance(weight, Float8Tensor):
            rounds = inputs is not None and inputs.kind == "float" and multiplies_float8(weight.device)
            scale = inputs.scale if inputs is not None and rounds else None
            return "fp8", pack_float8(weight, scale, multiplies=rounds)
        if inputs is not None and inputs.kind == "int" and takes_int8(weight):
            return "w8a8", pack8(weight, inputs.scale)
        packed = pack(weight)
    except UnsupportedLayout:
        return "f16", weight.dequantize(dtype)
    return f"w{packed.bits}a16", packed


def multiplies_float8(device: torch.device) -> bool:
    """Tensor cores do from sm_89 on."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
