"""Paged caches for kernel tests: scattered pages, a history per row, poison wherever nothing was stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble_kernels import reference

KV_TYPES = [torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn]


@dataclass
class Cache:
    """One layer. kv: [blocks, 2, block_size, G, E]; tables: int32 [rows, W], pages in no order."""

    kv: Tensor
    scales: Tensor | None
    tables: Tensor

    @property
    def kv_heads(self) -> int:
        return self.kv.shape[3]

    @property
    def width(self) -> int:
        return self.kv.shape[4]

    @property
    def device(self) -> torch.device:
        return self.kv.device

    def copies(self) -> tuple[Tensor, Tensor | None]:
        return self.kv.clone(), None if self.scales is None else self.scales.clone()

    def assert_close(self, kv: Tensor, scales: Tensor | None) -> None:
        """The same as another's, within a rounding of the stored type; untouched where that is poison."""
        ours, theirs = self.kv.float(), kv.float()
        step = {torch.float16: 2**-9, torch.bfloat16: 2**-6, torch.int8: 0.0, torch.float8_e4m3fn: 2**-2}
        slack = 1.0 if kv.dtype == torch.int8 else 2**-8
        torch.testing.assert_close(ours, theirs, rtol=step[kv.dtype], atol=slack, equal_nan=True)
        if self.scales is not None and scales is not None:
            torch.testing.assert_close(self.scales, scales, rtol=1e-5, atol=0, equal_nan=True)


def coarsest(operand: torch.dtype, stored: torch.dtype) -> torch.dtype:
    """The type whose roundings an answer carries: codes are exact in float16, and multiplied in it."""
    return torch.bfloat16 if torch.bfloat16 in (operand, stored) else torch.float16


def filled(
    lengths: Sequence[int],
    kv_heads: int,
    width: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    rest: float = math.nan,
) -> Cache:
    """Row b holds `lengths[b]` random positions and has pages for a few more; everything else is `rest`."""
    generator = torch.Generator().manual_seed(len(lengths) + width)
    pages = max(lengths) // block_size + 2
    blocks = len(lengths) * pages + 1
    shuffled = torch.randperm(blocks - 1, generator=generator) + 1
    tables = shuffled.view(len(lengths), pages).int().to(device)
    shape = (blocks, 2, block_size, kv_heads, width)
    quantized = dtype in reference.KV_CODES
    integers = math.isnan(rest) and not dtype.is_floating_point
    kv = torch.full(shape, -111 if integers else rest, device=device).to(dtype)
    scales = torch.full(shape[:-1], rest, device=device) if quantized else None
    for table, length in zip(tables, lengths, strict=True):
        key, value = torch.randn(2, length, kv_heads, width, generator=generator).to(device)
        reference.write_kv(kv, scales, table, 0, key, value)
    return Cache(kv, scales, tables)
