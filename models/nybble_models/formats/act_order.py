"""Which group each input belongs to, when a file says so input by input (`g_idx`), and back."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor
from nybble_models.errors import BrokenCheckpoint


def in_groups(weight: QuantizedTensor, g_idx: Tensor) -> QuantizedTensor:
    """`weight` has its columns in the order of the inputs; input k has the scales of group `g_idx[k]`.

    Where runs of `group_size` inputs share a group (static order, or whole groups exchanged), the scales
    are put in that order. Otherwise columns are sorted by group, and the permutation remembers where they
    came from. All zeros means that nobody filled `g_idx` in. Raises `BrokenCheckpoint`.
    """
    size, groups = weight.group_size, weight.scales.shape[1]
    index = g_idx.to(torch.int64).flatten()
    if len(index) != weight.in_features or int(index.min()) < 0 or int(index.max()) >= groups:
        raise BrokenCheckpoint(
            f"g_idx does not give each of {weight.in_features} inputs one of {groups} groups",
            hint="quantize the model again",
        )
    if not bool(index.any()):
        return weight
    firsts = index[::size]
    if torch.equal(firsts.repeat_interleave(size)[: len(index)], index):
        return _by_group(weight, firsts)
    permutation = torch.argsort(index, stable=True)
    if not torch.equal(index[permutation], static(weight.in_features, size)):
        raise BrokenCheckpoint(
            f"g_idx makes groups of other sizes than {size}", hint="is group_size of another model?"
        )
    return replace(weight, codes=weight.codes[:, permutation].contiguous(), permutation=permutation)


def _by_group(weight: QuantizedTensor, groups: Tensor) -> QuantizedTensor:
    if torch.equal(groups, torch.arange(len(groups))):
        return weight
    zeros = None if weight.zeros is None else weight.zeros[:, groups].contiguous()
    return replace(weight, scales=weight.scales[:, groups].contiguous(), zeros=zeros)


def by_input(weight: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Codes in the order of the inputs, uint8 [N, K], and the group of each input, int64 [K]."""
    g_idx = static(weight.in_features, weight.group_size)
    if weight.permutation is None:
        return weight.codes, g_idx
    back = torch.argsort(weight.permutation)
    return weight.codes[:, back], g_idx[back]


def static(inputs: int, group_size: int) -> Tensor:
    """int64 [inputs]: 0 0 0 ... 1 1 1 ..."""
    return torch.arange(inputs) // group_size
