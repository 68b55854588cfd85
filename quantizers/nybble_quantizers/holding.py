"""What a format can hold of a linear as it was read: the form to store it in, or why there is none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from nybble_kernels.float8 import Float8Tensor
from nybble_kernels.quantized import QuantizedTensor
from nybble_models.errors import ModelError
from nybble_models.formats.codec import form_of
from nybble_models.formats.compressed_tensors import scales_of_floats
from nybble_models.formats.container import Container
from nybble_models.formats.form import TENSOR, Form
from nybble_models.weights import Linear

Quantized = QuantizedTensor | Float8Tensor
Settings = Mapping[str, Any]

ROOM = 256  # outputs, and groups of inputs, that every format's words divide
KEEP = "keep the checkpoint as it is"


def form_held(linear: Linear, weight: Quantized, settings: Settings, target: Container) -> Form:
    """The form in which the target holds every value of the linear and how its inputs are rounded.

    weight: the linear's · settings: what its checkpoint says of it. Its width is not looked at: that is
    `Container.fits`. Raises `ModelError` where there is no such form.
    """
    form = _form(linear, weight, settings, target)
    _check_inputs(linear, form, settings)
    if isinstance(weight, QuantizedTensor) and weight.minimums is not None:
        raise ModelError(
            f"it has real minimums (GGUF Q4_1), and {target.name} holds integer zero points",
            hint="serve the file as it is, or quantize it anew with `nybble quantize`",
        )
    reason = target.fits((ROOM, form.group(1) * ROOM), form)
    if reason is not None:
        raise ModelError(reason, hint=_elsewhere(form, target))
    if isinstance(weight, QuantizedTensor):
        _check_levels(weight, target)
    elif scales_of_floats(weight) is None:
        raise ModelError("its floats share scales in blocks that are no squares", hint=KEEP)
    return form


def lost(settings: Settings) -> Iterator[str]:
    """A line for each thing that a checkpoint says and nybble neither reads nor writes."""
    if settings.get("kv_cache_scheme"):
        yield "what it says of the cache of keys and values is not carried over"
    inputs = [
        group.get("input_activations") or {} for group in (settings.get("config_groups") or {}).values()
    ]
    if any(asked.get("dynamic") and asked.get("strategy") == "tensor" for asked in inputs):
        yield "inputs get a scale a token, which is finer, where it asks for one found for all of them"


def _form(linear: Linear, weight: Quantized, settings: Settings, target: Container) -> Form:
    form = form_of(weight)
    shared = (settings.get("weights") or {}).get("strategy") == "tensor"
    if shared and target.name == "compressed-tensors" and _alike(weight):
        form = replace(form, group_size=TENSOR)  # other formats repeat the scale for every row
    if linear.inputs is None:
        return replace(form, inputs="group") if _asks_for_groups(settings, form) else form
    return replace(form, inputs="token" if linear.inputs.scale is None else "tensor")


def _asks_for_groups(settings: Settings, form: Form) -> bool:
    """Of inputs, as long as those of the weights: nybble leaves such inputs as they are, others may not."""
    asked = settings.get("input_activations") or {}
    groups = asked.get("strategy") == "group" and asked.get("dynamic") is True
    alike = asked.get("num_bits") == 8 and asked.get("type", "int") == form.kind
    same = asked.get("group_size") == form.group_size and asked.get("symmetric", True)
    return bool(groups and alike and same)


def _alike(weight: Quantized) -> bool:
    """Whether one scale and one zero serve the whole matrix."""
    zeros = weight.zeros if isinstance(weight, QuantizedTensor) else None
    tables = (weight.scales,) if zeros is None else (weight.scales, zeros)
    return all(bool((table == table[0, 0]).all()) for table in tables)


def _check_inputs(linear: Linear, form: Form, settings: Settings) -> None:
    """Raises `ModelError` for what a `Form` does not say of inputs, and would be lost."""
    if form.inputs is None and settings.get("input_activations"):
        raise ModelError(
            "its inputs are to be rounded with zero points, to other than 8 bits, or in other groups",
            hint=KEEP,
        )
    if linear.inputs is not None and linear.inputs.kind != form.kind:
        raise ModelError(
            f"its inputs are rounded to 8-bit {linear.inputs.kind}s, and its weights are {form.kind}s",
            hint=KEEP,
        )


def _elsewhere(form: Form, target: Container) -> str:
    if target.name == "compressed-tensors":
        return KEEP
    if form.kind == "int" and form.inputs is None:
        return "another --format may"
    return f"--format compressed-tensors, or quantize the original model with --format {target.name}"


def _check_levels(weight: QuantizedTensor, target: Container) -> None:
    """Raises `ModelError` for numbers that the target has no room for, whatever their form."""
    if weight.permutation is not None and "gptq" not in target.name:
        raise ModelError(
            f"it is in act-order, and {target.name} holds weights in the order of their inputs",
            hint="--format gptq_v2 keeps the order",
        )
    half = torch.equal(weight.scales.half().float(), weight.scales)
    if target.name != "compressed-tensors" and not half:
        raise ModelError(
            f"its scales are no float16 numbers, which {target.name} has", hint="--format compressed-tensors"
        )
    if target.name == "gptq" and weight.zeros is not None and not bool(weight.zeros.all()):
        raise ModelError("it has a zero point 0, which GPTQ v1 has not", hint="--format gptq_v2")
