"""What an on-disk format is: two pure functions between stored tensors and a quantized weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from nybble_kernels.float8 import Float8Tensor
from nybble_kernels.quantized import QuantizedTensor, Weight
from nybble_models.formats.form import CHANNEL, TENSOR, Form


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

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Whether a linear of these settings is of this format: names alone may not tell."""
        ...

    def decode(
        self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> QuantizedTensor | Float8Tensor:
        """Raises `BrokenCheckpoint` when shapes or settings contradict each other."""
        ...

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        """Raises `ValueError` when the format cannot hold the weight (see `fits`)."""
        ...

    def fits(self, shape: tuple[int, int], form: Form) -> str | None:
        """Why a linear of this shape cannot be stored in this form, or None."""
        ...

    def settings(self, forms: Mapping[str, Form | None]) -> dict[str, Any]:
        """The `quantization_config` that goes into config.json. None stands for a linear at 16 bits."""
        ...


def form_of(weight: QuantizedTensor | Float8Tensor) -> Form:
    """What a weight is, apart from its numbers."""
    group = weight.group_size if weight.group_size < weight.in_features else CHANNEL
    if isinstance(weight, Float8Tensor):
        return Form(8, group, True, "float")
    return Form(weight.bits, group, weight.symmetric)


def levels_of(weight: Weight) -> QuantizedTensor:
    """The same, for a format that holds nothing else. Raises `ValueError`."""
    if not isinstance(weight, QuantizedTensor):
        raise ValueError("the format holds integer levels, not floats")
    return weight


def needs_floats(form: Form) -> str | None:
    """Why a format of integer levels for float inputs cannot hold a form, or None."""
    if form.kind != "int":
        return "8-bit floats need compressed-tensors"
    if form.inputs is not None:
        return "rounded inputs need compressed-tensors"
    if form.group_size == TENSOR:
        return "one scale for a whole matrix needs compressed-tensors"
    return None
