"""The meeting point of every format, every quantizer and every kernel: integer codes and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nybble_kernels import float8
from nybble_kernels.float8 import Float8Tensor


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight matrix of `bits`-bit levels with one scale per row and group of `group_size` inputs.

    With `g = k // group_size` the value of an element is

        w[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g])        integer zero points
        w[n, k] = scales[n, g] *  codes[n, k] + minimums[n, g]      real minimums (GGUF Q4_1)

    and `zeros = 2 ** (bits - 1)` everywhere when neither is stored (symmetric). Signed formats are stored
    as unsigned levels, so int8 `q` is code `q + 128`.

    codes: uint8 [N, K] · scales: float32 [N, G] · zeros: uint8 [N, G] or None · minimums: float32 [N, G] or
    None · permutation: int64 [K] or None; when present, column k multiplies input `permutation[k]`.
    The last group may be short (`G = ceil(K / group_size)`).
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group_size: int
    zeros: Tensor | None = None
    minimums: Tensor | None = None
    permutation: Tensor | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, found {self.bits}")
        if self.codes.dtype != torch.uint8 or self.codes.dim() != 2:
            raise ValueError(f"codes must be uint8 [N, K], found {self.codes.dtype} {list(self.codes.shape)}")
        groups = [self.out_features, -(-self.in_features // self.group_size)]
        for name in ("scales", "zeros", "minimums"):
            value = getattr(self, name)
            if value is not None and list(value.shape) != groups:
                raise ValueError(f"{name} must be {groups} for {self.describe()}, found {list(value.shape)}")
        if self.zeros is not None and self.minimums is not None:
            raise ValueError("a quantized tensor has integer zeros or real minimums, not both")

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def symmetric(self) -> bool:
        return self.zeros is None and self.minimums is None

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def describe(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric" if self.zeros is not None else "real minimum"
        return f"int{self.bits} g{self.group_size} {kind} {list(self.codes.shape)}"

    def offsets(self) -> Tensor:
        """float32 [N, G] such that `w = scales * codes + offsets`, whatever the kind of zero point."""
        if self.minimums is not None:
            return self.minimums
        zeros = 2.0 ** (self.bits - 1) if self.zeros is None else self.zeros.float()
        return -self.scales * zeros

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K] in the order of the inputs: what the codes mean. Computed in float32, then rounded once."""
        codes = self.codes.float()
        scales = self._per_input(self.scales)
        if self.minimums is not None:
            weight = codes.mul_(scales).add_(self._per_input(self.minimums))
        else:
            zeros = 2.0 ** (self.bits - 1) if self.zeros is None else self._per_input(self.zeros.float())
            weight = codes.sub_(zeros).mul_(scales)
        if self.permutation is not None:
            weight = weight[:, torch.argsort(self.permutation)]
        return weight.to(dtype)

    def _per_input(self, groups: Tensor) -> Tensor:
        return groups.repeat_interleave(self.group_size, dim=1)[:, : self.in_features]

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """The linear that makes outputs `[start, stop)` only (a shard, or one partner of a fused weight)."""
        return self._map(_PER_ROW, lambda tensor: tensor[start:stop])

    def select(self, outputs: Tensor) -> QuantizedTensor:
        """The rows of these outputs, in this order (int64 [M])."""
        return self._map(_PER_ROW, lambda tensor: tensor[outputs])

    def to(self, device: torch.device | str) -> QuantizedTensor:
        return self._map(_TENSORS, lambda tensor: tensor.to(device))

    def _map(self, names: Sequence[str], change: Callable[[Tensor], Tensor]) -> QuantizedTensor:
        held = {name: getattr(self, name) for name in names}
        changed: dict[str, Any] = {name: change(t) for name, t in held.items() if t is not None}
        return replace(self, **changed)

    @property
    def nbytes(self) -> int:
        """Bytes that a packed form must read: codes at `bits` bits, 16-bit scales, and zeros or minimums."""
        groups = self.scales.numel()
        zero_bits = 16 if self.minimums is not None else 0 if self.zeros is None else self.bits
        return (self.codes.numel() * self.bits + groups * (16 + zero_bits)) // 8


_PER_ROW = ("codes", "scales", "zeros", "minimums")
_TENSORS = (*_PER_ROW, "permutation")

Weight = Tensor | QuantizedTensor | Float8Tensor
"""A projection as loaded: float [N, K], or quantized."""

Table = Tensor | QuantizedTensor
"""What an embedding may be: [V, D]."""


def cat(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Stack partners along the outputs (q, k, v -> qkv). They share bits, group, kind and permutation."""
    first = parts[0]
    for part in parts[1:]:
        if not compatible(first, part):
            raise ValueError(f"cannot fuse {first.describe()} with {part.describe()}")
    stacked: dict[str, Any] = {
        name: None if getattr(first, name) is None else torch.cat([getattr(p, name) for p in parts])
        for name in _PER_ROW
    }
    return replace(first, **stacked)


def compatible(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Whether two weights that read the same input can be stacked into one."""
    same_order = (a.permutation is None) == (b.permutation is None) and (
        a.permutation is None or b.permutation is None or torch.equal(a.permutation, b.permutation)
    )
    kinds = [(w.bits, w.group_size, w.in_features, w.zeros is None, w.minimums is None) for w in (a, b)]
    return kinds[0] == kinds[1] and same_order


def stacked(parts: Sequence[Weight]) -> Weight | None:
    """Partners along the outputs as one weight; None where their kinds differ."""
    floats = [p for p in parts if isinstance(p, Tensor)]
    if len(floats) == len(parts):
        return torch.cat(floats)
    levels = [p for p in parts if isinstance(p, QuantizedTensor)]
    if len(levels) == len(parts) and all(compatible(levels[0], p) for p in levels):
        return cat(levels)
    eights = [p for p in parts if isinstance(p, Float8Tensor)]
    if len(eights) == len(parts) and len({p.group_size for p in eights}) == 1:
        return float8.stack(eights)
    return None


def shape_of(weight: Weight) -> tuple[int, int]:
    """(outputs, inputs) of a weight of any kind."""
    return weight.shape[0], weight.shape[1]


def look_up(table: Table, rows: Tensor) -> Tensor:
    """float32 rows of a weight of any kind, int64 [T] -> [T, K]: what an embedding is."""
    return table[rows].float() if isinstance(table, Tensor) else table.select(rows).dequantize()


def dense(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight as a float matrix."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)
