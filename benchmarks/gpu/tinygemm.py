"""The int4 format of `torch.ops.aten._weight_int4pack_mm`, from our codes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nybble_kernels.quantized import QuantizedTensor

TILES = 8  # inner k tiles of its packing: the widest


def pack_tinygemm(weight: QuantizedTensor, multiple: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """(words, scales and zeros bfloat16 [G, N, 2], what they mean float32 [N, K]).

    The op computes (q - 8) · scale + zero with both in bfloat16. Inputs are padded to `multiple` by groups
    whose scale is 0.
    """
    codes, scales, zeros = unsigned(weight, multiple)
    pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
    words = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), TILES)
    both = torch.stack((scales, zeros), dim=-1).transpose(0, 1).contiguous()  # [G, N, 2]
    return words, both, meaning(weight, scales, zeros)


def unsigned(weight: QuantizedTensor, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [N, K'], scales and zeros bfloat16 [N, G'] in the op's terms, padded."""
    more = -weight.in_features % multiple
    scales = weight.scales
    zeros = weight.offsets() + 8 * scales
    padded = [F.pad(each, (0, more // weight.group_size)).bfloat16() for each in (scales, zeros)]
    return F.pad(weight.codes, (0, more)), padded[0], padded[1]


def meaning(weight: QuantizedTensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """float32 [N, K] of the rounded scales and zeros."""

    def wide(groups: Tensor) -> Tensor:
        return groups.float().repeat_interleave(weight.group_size, dim=1)[:, : weight.in_features]

    return (weight.codes.float() - 8) * wide(scales) + wide(zeros)
