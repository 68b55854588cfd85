"""`Container`: the format of a whole checkpoint, by the name that a user gives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor, Weight
from nybble_models.errors import ModelError
from nybble_models.formats.awq import AwqCodec
from nybble_models.formats.codec import Codec
from nybble_models.formats.compressed_tensors import (
    FloatQuantizedCodec,
    IntQuantizedCodec,
    PackQuantizedCodec,
)
from nybble_models.formats.config_groups import format_of
from nybble_models.formats.form import TENSOR, Form
from nybble_models.formats.gptq import GptqCodec
from nybble_models.weights import Linear


@dataclass(frozen=True)
class Container:
    """Which codec stores a linear of which form."""

    name: str
    codec: Callable[[Form], Codec]

    def fits(self, shape: tuple[int, int], form: Form) -> str | None:
        """Why a linear cannot be stored, or None."""
        return self.codec(form).fits(shape, form)

    def encode(self, linear: Linear, form: Form) -> dict[str, Tensor]:
        """What a quantized linear is stored as, bias aside: by local name."""
        stored = self.codec(form).encode(linear.weight)
        if form.group_size == TENSOR:
            stored["weight_scale"] = stored["weight_scale"].flatten()[:1].clone()
            stored |= _one_zero(linear.weight)
        if linear.inputs is not None and linear.inputs.scale is not None:
            stored["input_scale"] = torch.tensor([linear.inputs.scale])
        return stored


def _one_zero(weight: Weight) -> dict[str, Tensor]:
    """The zero point of a whole matrix: plain int8, as one level is not worth a packed word."""
    if not isinstance(weight, QuantizedTensor) or weight.zeros is None:
        return {}
    zero = int(weight.zeros[0, 0]) - 2 ** (weight.bits - 1)
    return {"weight_zero_point": torch.tensor([zero], dtype=torch.int8)}


_AWQ, _V1, _V2 = AwqCodec(), GptqCodec(), GptqCodec(version=2)
_ORDERED = {"gptq": GptqCodec(act_order=True), "gptq_v2": GptqCodec(version=2, act_order=True)}
_COMPRESSED: Mapping[str, Codec] = {
    codec.format: codec for codec in (PackQuantizedCodec(), IntQuantizedCodec(), FloatQuantizedCodec())
}

CONTAINERS: Mapping[str, Container] = {
    each.name: each
    for each in (
        Container("awq", lambda form: _AWQ),
        Container("gptq", lambda form: _V1),
        Container("gptq_v2", lambda form: _V2),
        Container("compressed-tensors", lambda form: _COMPRESSED[format_of(form)]),
    )
}


def container(name: str, act_order: bool = False) -> Container:
    """`act_order`: every input says which group it is of. Raises `ModelError` for a name that is none."""
    if act_order:
        if name not in _ORDERED:
            raise ModelError(f"{name} holds no act-order weights", hint="--format gptq and gptq_v2 do")
        return Container(name, lambda form: _ORDERED[name])
    if name not in CONTAINERS:
        raise ModelError(f"format {name!r} is unknown", hint=f"known: {', '.join(CONTAINERS)}")
    return CONTAINERS[name]
