"""To the nearest, in whatever form: weights as they will be stored, and what their inputs are rounded to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from nybble_kernels.activations import LIMITS, Activations
from nybble_kernels.float8 import Float8Tensor
from nybble_kernels.quantized import QuantizedTensor
from nybble_models.errors import BrokenCheckpoint
from nybble_models.formats.form import TENSOR, Form
from nybble_models.weights import Block, Linear
from nybble_quantizers import fp8, rtn
from nybble_quantizers.folding import float_weight

Quantized = QuantizedTensor | Float8Tensor


def nearest(weight: Tensor, form: Form, *, mse: bool = False) -> Quantized:
    """[N, K] on the grid that spans each group, or with `mse` on the best within (of integers)."""
    if form.kind == "float":
        return fp8.quantize(weight, form.group_size)
    group, shared = form.group(weight.shape[1]), form.group_size == TENSOR
    return rtn.quantize(weight, form.bits, group, form.symmetric, per_tensor=shared, mse=mse)


def nearest_block(block: Block, forms: Mapping[str, Form], names: Mapping[str, str], mse: bool) -> Block:
    """The block with linears in their `forms`, each by itself; `names` are the full ones."""
    linears = dict(block.linears)
    for p, form in forms.items():
        with naming(names[p]):
            rounded = nearest(float_weight(linears[p]), form, mse=mse)
        linears[p] = Linear(rounded, linears[p].bias, tokenwise(form))
    return Block(linears, block.norms)


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


@contextmanager
def naming(part: str) -> Iterator[None]:
    """Says which part of the model holds numbers that cannot be rounded."""
    try:
        yield
    except ValueError as error:
        raise BrokenCheckpoint(f"{part}: {error}", hint="is the checkpoint damaged? fetch it again") from None
