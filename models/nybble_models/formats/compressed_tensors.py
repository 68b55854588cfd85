"""compressed-tensors (llm-compressor's and vLLM's files): levels packed into int32, plain int8, 8-bit floats.

    pack-quantized  weight_packed int32 [N, ceil(K·b/32)] · weight_scale [N, G] · weight_shape int64 (N, K)
                    asymmetric: weight_zero_point int32 [ceil(N·b/32), G], packed along the outputs
    int-quantized   weight int8 [N, K] · weight_scale [N, G] · asymmetric: weight_zero_point int8 [N, G]
    float-quantized weight float8_e4m3fn [N, K] · weight_scale [N, 1], or [N / 128, K / 128] of blocks

Values are signed. Packed ones are stored as `q + 2**(b-1)`, levels of a `bitstream`; others as they are.
So weight_packed is GPTQ's qweight transposed. G is 1 for a scale a row; a scale of one element is the whole
tensor's. Where inputs have one scale for all, it is `input_scale` [1] (see `config_groups`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nybble_kernels.float8 import Float8Tensor
from nybble_kernels.quantized import QuantizedTensor, Weight
from nybble_models.errors import BrokenCheckpoint
from nybble_models.formats import act_order, bitstream
from nybble_models.formats.codec import levels_of
from nybble_models.formats.config_groups import METHOD, format_of, settings_of
from nybble_models.formats.form import Form

WIDTHS = range(2, 9)
NOT_A_NUMBER = 0x7F  # of E4M3FN, with either sign

Settings = Mapping[str, Any]


class _CompressedTensors:
    method = METHOD
    format: str
    kind = "int"

    def reads(self, settings: Settings) -> bool:
        return bool((settings.get("weights") or {}).get("type", "int") == self.kind)

    def fits(self, shape: tuple[int, int], form: Form) -> str | None:
        group = form.group(shape[1])
        if shape[1] % group:
            return f"{shape[1]} inputs are not a multiple of the group size {group}"
        if format_of(form) != self.format:
            return f"{form.label} is stored as {format_of(form)}, not {self.format}"
        return None

    def _levels(self, weight: Weight) -> QuantizedTensor:
        """Raises `ValueError` unless it is a weight of levels that these formats can say."""
        weight = levels_of(weight)
        reason = None
        if weight.in_features % weight.group_size:
            reason = f"{weight.in_features} inputs are not a multiple of the group size {weight.group_size}"
        if weight.minimums is not None:
            reason = "compressed-tensors holds integer zero points, not real minimums"
        if weight.permutation is not None:
            reason = "compressed-tensors holds weights in input order only"
        if reason:
            raise ValueError(reason)
        return weight

    def settings(self, forms: Mapping[str, Form | None]) -> dict[str, Any]:
        return settings_of(forms)


class PackQuantizedCodec(_CompressedTensors):
    """2 to 8 bits in words, for float activations (W4A16, W8A16)."""

    format = "pack-quantized"
    names = ("weight_packed", "weight_scale", "weight_shape")
    optional = ("weight_zero_point", "weight_g_idx", "input_scale")

    def decode(self, tensors: Mapping[str, Tensor], settings: Settings) -> QuantizedTensor:
        bits, symmetric = _weights(settings)
        packed, scale, shape = (tensors[name] for name in self.names)
        outputs, inputs = (int(n) for n in shape)
        if packed.dtype != torch.int32 or list(packed.shape) != [outputs, bitstream.words(inputs, bits)]:
            raise BrokenCheckpoint(
                f"weight_packed is {list(packed.shape)}, which is not [{outputs}, {inputs}] at {bits} bits",
                hint="is quantization_config of another model? else download the checkpoint again",
            )
        scales, group = _scales(scale, outputs, inputs, settings)
        zero = None if symmetric else tensors.get("weight_zero_point")
        if zero is not None and zero.dtype == torch.int32:
            zero = bitstream.unpack(zero.T, bits, outputs).T
        elif zero is not None:
            zero = _levels(zero, bits)
        weight = QuantizedTensor(
            bitstream.unpack(packed, bits, inputs), scales, bits, group, _zeros(zero, scales, bits, symmetric)
        )
        order = tensors.get("weight_g_idx")
        return weight if order is None or int(order.min()) < 0 else act_order.in_groups(weight, order)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        weight = self._levels(weight)
        stored = {
            "weight_packed": bitstream.pack(weight.codes, weight.bits),
            "weight_scale": _exact(weight.scales),
            "weight_shape": torch.tensor(weight.shape),
        }
        if weight.zeros is not None:
            stored["weight_zero_point"] = bitstream.pack(weight.zeros.T, weight.bits).T.contiguous()
        return stored


class IntQuantizedCodec(_CompressedTensors):
    """Weights as int8, for inputs rounded to 8 bits (W8A8)."""

    format = "int-quantized"
    names = ("weight_scale", "weight")
    optional = ("weight_zero_point", "input_scale")

    def decode(self, tensors: Mapping[str, Tensor], settings: Settings) -> QuantizedTensor:
        bits, symmetric = _weights(settings)
        scale, values = (tensors[name] for name in self.names)
        half = 2 ** (bits - 1)
        if values.dtype != torch.int8 or values.dim() != 2:
            raise BrokenCheckpoint(
                f"weight is {values.dtype} {list(values.shape)}, not an int8 matrix",
                hint="is quantization_config of another model?",
            )
        if int(values.min()) < -half or int(values.max()) >= half:
            raise BrokenCheckpoint(
                f"weight holds values that are not {bits}-bit", hint="is num_bits of another model?"
            )
        scales, group = _scales(scale, values.shape[0], values.shape[1], settings)
        zero = None if symmetric else tensors.get("weight_zero_point")
        zero = None if zero is None else _levels(zero, bits)
        return QuantizedTensor(
            _levels(values, bits), scales, bits, group, _zeros(zero, scales, bits, symmetric)
        )

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        weight = self._levels(weight)
        stored = {
            "weight": _signed(weight.codes, weight.bits),
            "weight_scale": _exact(weight.scales),
        }
        if weight.zeros is not None:
            stored["weight_zero_point"] = _signed(weight.zeros, weight.bits)
        return stored


class FloatQuantizedCodec(_CompressedTensors):
    """Weights as E4M3, for inputs rounded to the same (FP8_DYNAMIC, FP8, FP8_BLOCK) or left alone."""

    format = "float-quantized"
    kind = "float"
    names = ("weight_scale", "weight")
    optional = ("input_scale",)

    def fits(self, shape: tuple[int, int], form: Form) -> str | None:
        """Blocks may be short at the ends."""
        return None if form.blocks else super().fits(shape, form)

    def decode(self, tensors: Mapping[str, Tensor], settings: Settings) -> Float8Tensor:
        _refuse_rotations(settings)
        scale, values = (tensors[name] for name in self.names)
        if values.dtype != torch.float8_e4m3fn or values.dim() != 2:
            raise BrokenCheckpoint(
                f"weight is {values.dtype} {list(values.shape)}, not a float8_e4m3fn matrix",
                hint="is quantization_config of another model?",
            )
        if bool((values.view(torch.uint8) & 0x7F == NOT_A_NUMBER).any()):
            raise BrokenCheckpoint("weight holds NaN", hint="quantize the model again")
        outputs, inputs = values.shape
        block = _block(settings)
        if block is None:
            scales, size = _scales(scale, outputs, inputs, settings)
            return Float8Tensor(values, scales, size)
        expected = [-(-outputs // block[0]), -(-inputs // block[1])]
        if list(scale.shape) != expected:
            raise BrokenCheckpoint(
                f"weight_scale {list(scale.shape)} does not fit [{outputs}, {inputs}] in blocks of {block}",
                hint="is quantization_config of another model?",
            )
        rows = scale.float().repeat_interleave(block[0], dim=0)[:outputs]
        return Float8Tensor(values, rows.contiguous(), block[1])

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        scales = scales_of_floats(weight) if isinstance(weight, Float8Tensor) else None
        if not isinstance(weight, Float8Tensor) or scales is None:
            raise ValueError(f"{self.format} holds 8-bit floats with one scale a row or square block")
        return {"weight": weight.values.contiguous(), "weight_scale": _exact(scales)}


def scales_of_floats(weight: Float8Tensor) -> Tensor | None:
    """As stored: [N, 1] of rows, or [N / group size, K / group size]; None where blocks are no squares."""
    if weight.by_row:
        return weight.scales
    size = weight.group_size
    first = weight.scales[::size]
    rows = first.repeat_interleave(size, dim=0)[: weight.out_features]
    return first if torch.equal(rows, weight.scales) else None


def _block(settings: Settings) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where the settings say so: [128, 128], or "128x128"."""
    weights = settings.get("weights") or {}
    if weights.get("strategy") != "block":
        return None
    found = weights.get("block_structure")
    try:
        rows, columns = (int(size) for size in (found.split("x") if isinstance(found, str) else found or ()))
    except (TypeError, ValueError):
        rows = columns = 0
    if min(rows, columns) < 1:
        raise BrokenCheckpoint(
            f"block_structure {found!r} is not two sizes", hint="mend config.json, or download it again"
        )
    return rows, columns


def _refuse_rotations(settings: Settings) -> None:
    if (settings.get("transform_config") or {}).get("config_groups"):
        raise BrokenCheckpoint(
            "compressed-tensors with a transform_config (rotated activations) is not supported",
            hint="checkpoints without rotations are",
        )


def _weights(settings: Settings) -> tuple[int, bool]:
    """(bits, symmetric) of the group of `config_groups` that the linear belongs to."""
    _refuse_rotations(settings)
    weights = settings.get("weights") or {}
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    if not isinstance(bits, int) or bits not in WIDTHS or kind != "int":
        raise BrokenCheckpoint(
            f"compressed-tensors weights with num_bits={bits}, type={kind!r} are not supported",
            hint="integers of 2 to 8 bits are, and floats of 8",
        )
    return bits, bool(weights.get("symmetric", True))


def _scales(scale: Tensor, outputs: int, inputs: int, settings: Settings) -> tuple[Tensor, int]:
    """float32 [N, G] and the group size."""
    size = settings["weights"].get("group_size") or -1
    size = min(size, inputs) if size > 0 else inputs
    scales = scale.float()
    if scales.numel() == 1:
        scales = scales.reshape(1, 1).expand(outputs, -(-inputs // size))
    elif scales.dim() == 1 and size == inputs:
        scales = scales[:, None]
    if list(scales.shape) != [outputs, -(-inputs // size)]:
        raise BrokenCheckpoint(
            f"weight_scale {list(scale.shape)} does not fit [{outputs}, {inputs}] in groups of {size}",
            hint="is quantization_config of another model?",
        )
    return scales.contiguous(), size


def _zeros(zero: Tensor | None, scales: Tensor, bits: int, symmetric: bool) -> Tensor | None:
    """uint8 [N, G]; an asymmetric file leaves out a zero that is 0 throughout."""
    if symmetric:
        return None
    if zero is None:
        return torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
    if zero.numel() == 1:
        zero = zero.reshape(1, 1).expand_as(scales)
    elif zero.dim() == 1:
        zero = zero[:, None]
    if zero.shape != scales.shape:
        raise BrokenCheckpoint(
            f"weight_zero_point {list(zero.shape)} is not of the shape of the scales {list(scales.shape)}",
            hint="download the checkpoint again",
        )
    return zero.contiguous()


def _levels(values: Tensor, bits: int) -> Tensor:
    """Signed integers -> uint8."""
    return values.to(torch.int16).add(1 << (bits - 1)).to(torch.uint8)


def _signed(levels: Tensor, bits: int) -> Tensor:
    return levels.to(torch.int16).sub(1 << (bits - 1)).to(torch.int8)


def _exact(scales: Tensor) -> Tensor:
    """float16 where that loses nothing."""
    half = scales.to(torch.float16)
    return half.contiguous() if torch.equal(half.float(), scales) else scales.contiguous()
