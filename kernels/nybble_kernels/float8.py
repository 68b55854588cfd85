"""`Float8Tensor`: a weight of 8-bit floats (E4M3) and what scales them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LARGEST = 448.0  # of E4M3FN, which has no infinity


@dataclass(frozen=True, eq=False)
class Float8Tensor:
    """w[n, k] = scales[n, k // group_size] · values[n, k].

    values: float8_e4m3fn [N, K] · scales: float32 [N, G]. G is 1 where a row, or the whole matrix, has one
    scale; the last group may be short (`G = ceil(K / group_size)`). Same verbs as `QuantizedTensor`.
    """

    values: Tensor
    scales: Tensor
    group_size: int

    def __post_init__(self) -> None:
        if self.values.dtype != torch.float8_e4m3fn or self.values.dim() != 2:
            found = f"{self.values.dtype} {list(self.values.shape)}"
            raise ValueError(f"values must be float8_e4m3fn [N, K], found {found}")
        groups = [self.out_features, -(-self.in_features // self.group_size)]
        if list(self.scales.shape) != groups:
            raise ValueError(f"scales must be {groups}, found {list(self.scales.shape)}")

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        return self.values.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def by_row(self) -> bool:
        """Whether one scale serves a whole row."""
        return self.group_size >= self.in_features

    @property
    def device(self) -> torch.device:
        return self.values.device

    def describe(self) -> str:
        return f"fp8 g{self.group_size} {list(self.shape)}"

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K]: what the values mean. Computed in float32, then rounded once."""
        scales = self.scales if self.by_row else self.scales.repeat_interleave(self.group_size, dim=1)
        return self.values.float().mul_(scales[:, : self.in_features]).to(dtype)

    def rows(self, start: int, stop: int) -> Float8Tensor:
        """The linear that makes outputs `[start, stop)` only."""
        return replace(self, values=self.values[start:stop], scales=self.scales[start:stop])

    def select(self, outputs: Tensor) -> Float8Tensor:
        """The rows of these outputs, in this order (int64 [M])."""
        values = through_bytes(self.values, lambda held: held[outputs])
        return replace(self, values=values, scales=self.scales[outputs])

    def to(self, device: torch.device | str) -> Float8Tensor:
        return replace(self, values=self.values.to(device), scales=self.scales.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes that a packed form must read: a byte an element, and 16-bit scales."""
        return self.values.numel() + 2 * self.scales.numel()


def stack(parts: Sequence[Float8Tensor]) -> Float8Tensor:
    """Partners along the outputs (q, k, v -> qkv); all have one group size."""
    bytes_of = torch.cat([part.values.view(torch.uint8) for part in parts])
    scales = torch.cat([part.scales for part in parts])
    return replace(parts[0], values=bytes_of.view(torch.float8_e4m3fn), scales=scales)


def through_bytes(values: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """What only moves elements, for a type that PyTorch does not index."""
    return change(values.view(torch.uint8)).view(values.dtype)
