"""AWQ, GEMM layout: int32 words of eight 4-bit levels along the outputs (Lin et al. 2024; AutoAWQ's files).

    qweight int32 [K, N/8] · qzeros int32 [K/g, N/8] · scales float16 [K/g, N]

Bits 4i..4i+3 of word c hold output column 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]; zeros are stored as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor, Weight
from nybble_models.errors import BrokenCheckpoint
from nybble_models.formats.codec import form_of, levels_of, needs_floats
from nybble_models.formats.form import Form, rule

BITS = 4


class AwqCodec:
    """4-bit, grouped, asymmetric; a symmetric weight is stored with the constant zero 8."""

    method = "awq"
    names = ("qweight", "qzeros", "scales")
    optional = ()

    def reads(self, settings: Mapping[str, Any]) -> bool:
        return True

    def decode(self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> QuantizedTensor:
        bits = settings.get("bits", settings.get("w_bit", BITS))
        version = str(settings.get("version", "gemm")).lower()
        if bits != BITS or version != "gemm":
            raise BrokenCheckpoint(
                f"AWQ with bits={bits}, version={version!r} is not supported",
                hint="4-bit checkpoints in the gemm layout are",
            )
        qweight, qzeros, scales = (tensors[name] for name in self.names)
        inputs, outputs = qweight.shape[0], qweight.shape[1] * 8
        groups = scales.shape[0]
        if scales.shape[1] != outputs or tuple(qzeros.shape) != (groups, outputs // 8) or inputs % groups:
            raise BrokenCheckpoint(
                f"qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and scales {list(scales.shape)} "
                "do not belong together",
                hint="download the checkpoint again",
            )
        zeros = unpack(qzeros)
        symmetric = not settings.get("zero_point", True) and bool((zeros == 8).all())
        return QuantizedTensor(
            codes=unpack(qweight).T.contiguous(),
            scales=scales.float().T.contiguous(),
            bits=BITS,
            group_size=inputs // groups,
            zeros=None if symmetric else zeros.T.contiguous(),
        )

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        weight = levels_of(weight)
        reason = self.fits(weight.shape, form_of(weight))
        if reason or weight.minimums is not None or weight.permutation is not None:
            raise ValueError(reason or "AWQ holds integer zero points in input order only")
        zeros = torch.full_like(weight.scales, 8, dtype=torch.uint8) if weight.zeros is None else weight.zeros
        return {
            "qweight": pack(weight.codes.T),
            "qzeros": pack(zeros.T),
            "scales": weight.scales.T.to(torch.float16).contiguous(),
        }

    def fits(self, shape: tuple[int, int], form: Form) -> str | None:
        outputs, inputs = shape
        group = form.group(inputs)
        if (reason := needs_floats(form)) is not None:
            return reason
        if form.bits != BITS:
            return f"AWQ holds 4-bit weights, not {form.bits}-bit"
        if outputs % 8:
            return f"{outputs} outputs are not a multiple of 8"
        if inputs % group:
            return f"{inputs} inputs are not a multiple of the group size {group}"
        return None

    def settings(self, forms: Mapping[str, Form | None]) -> dict[str, Any]:
        """Raises `ValueError` for linears of several forms."""
        form = rule(forms.values())
        if any(other not in (None, form) for other in forms.values()):
            raise ValueError("AWQ has one form for all linears")
        return {
            "quant_method": self.method,
            "version": "gemm",
            "bits": form.bits,
            "group_size": form.group_size,
            "zero_point": not form.symmetric,
            "sym": form.symmetric,
            "desc_act": False,
            "modules_to_not_convert": [name for name, found in forms.items() if found is None] or None,
        }


def pack(levels: Tensor) -> Tensor:
    """uint8 [R, C] with values 0..15 -> int32 [R, C/8]; bytes as `unpack` says."""
    columns = levels.T.reshape(-1, 8, len(levels))  # [C/8, 8, R]: codes are stored by column
    words = torch.zeros(len(columns), len(levels), dtype=torch.int32)
    for b in range(4):
        low = 4 * (b % 2) + b // 2
        words |= (columns[:, low] | columns[:, low + 2] << 4).to(torch.int32) << 8 * b
    return words.T.clone(memory_format=torch.contiguous_format)


def unpack(words: Tensor) -> Tensor:
    """int32 [R, C/8] -> uint8 [R, C].

    Byte b of a word holds columns 4 (b mod 2) + b div 2 (low nibble) and two further on (high nibble).
    """
    held = (
        words.contiguous().view(torch.uint8).view(*words.shape, 2, 2).transpose(2, 3)
    )  # [R, C/8, b mod 2, b div 2]
    columns = torch.empty(*words.shape, 2, 2, 2, dtype=torch.uint8)
    columns[:, :, :, 0] = held & 15
    columns[:, :, :, 1] = held >> 4
    return columns.view(words.shape[0], -1)
