"""To the nearest, in whatever form: weights as they will be stored, and what their inputs are rounded to."""

from __future__ import annotations

from torch import Tensor

from nybble_kernels.activations import LIMITS, Activations
from nybble_kernels.float8 import Float8Tensor
from nybble_kernels.quantized import QuantizedTensor
from nybble_models.formats.form import TENSOR, Form
from nybble_quantizers import fp8, rtn

Quantized = QuantizedTensor | Float8Tensor


def nearest(weight: Tensor, form: Form) -> Quantized:
    """[N, K] on the grid that spans each group."""
    if form.kind == "float":
        return fp8.quantize(weight, form.group_size)
    group, shared = form.group(weight.shape[1]), form.group_size == TENSOR
    return rtn.quantize(weight, form.bits, group, form.symmetric, per_tensor=shared)


def fake(weight: Tensor, form: Form) -> Tensor:
    """`nearest(...).dequantize()`, for integers without the tensor between."""
    if form.kind == "float" or form.group_size == TENSOR:
        return nearest(weight, form).dequantize()
    return rtn.fake(weight, form.bits, form.group(weight.shape[1]), form.symmetric)


def inputs_of(form: Form, largest: float) -> Activations | None:
    """What a form asks of inputs; a static scale puts the largest magnitude seen at the largest code."""
    if form.inputs == "tensor":
        return Activations(form.kind, largest / LIMITS[form.kind])
    return tokenwise(form)


def tokenwise(form: Form) -> Activations | None:
    """What a form asks of inputs that nobody has seen."""
    return None if form.inputs is None else Activations(form.kind)
