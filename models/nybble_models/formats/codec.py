"""What an on-disk format is: two pure functions between stored tensors and a QuantizedTensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor


class Codec(Protocol):
    """Names are local to one linear ("qweight", not "model.layers.0.….qweight"). Inputs are not modified."""

    @property
    def method(self) -> str:
        """`quantization_config.quant_method`"""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that a quantized linear consists of, bias aside."""
        ...

    @property
    def optional(self) -> tuple[str, ...]:
        """Tensors that may be there too."""
        ...

    def decode(self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> QuantizedTensor:
        """Raises `BrokenCheckpoint` when shapes or settings contradict each other."""
        ...

    def encode(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """Raises `ValueError` when the format cannot hold the weight (see `fits`)."""
        ...

    def fits(self, shape: tuple[int, int], bits: int, group_size: int) -> str | None:
        """Why a linear of this shape cannot be stored, or None."""
        ...

    def settings(
        self, bits: int, group_size: int, symmetric: bool, skipped: tuple[str, ...]
    ) -> dict[str, Any]:
        """The `quantization_config` that goes into config.json."""
        ...
