"""The `config_groups` of compressed-tensors: how linears are stored, and what becomes of their inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nybble_kernels.activations import Activations
from nybble_models.errors import BrokenCheckpoint
from nybble_models.families import FAMILIES
from nybble_models.formats.form import CHANNEL, TENSOR, Form, rule

METHOD = "compressed-tensors"
TABLES = frozenset(family.embed for family in FAMILIES)  # names that are no `Linear` to other programs


def format_of(form: Form) -> str:
    """Which of the formats holds it."""
    if form.kind == "float":
        return "float-quantized"
    return "pack-quantized" if form.inputs is None else "int-quantized"


def settings_of(forms: Mapping[str, Form | None]) -> dict[str, Any]:
    """The form that most linears have is that of every `Linear`; others are listed by name.

    So is an embedding in a group of its own, whatever its form: "Linear" does not mean it.
    """
    common = rule(form for name, form in forms.items() if name not in TABLES)
    named: dict[tuple[bool, Form], list[str]] = {}
    for name, form in forms.items():
        if form is not None and (name in TABLES or form != common):
            named.setdefault((name in TABLES, form), []).append(name)
    groups = {"group_0": _group(common, ["Linear"])}
    for number, ((_, form), names) in enumerate(named.items(), start=1):
        groups[f"group_{number}"] = _group(form, names)
    formats = {group["format"] for group in groups.values()}
    left = [name for name, form in forms.items() if form is None]
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": left if "lm_head" in forms else ["lm_head", *left],
        "kv_cache_scheme": None,
        "config_groups": groups,
    }


def _group(form: Form, targets: list[str]) -> dict[str, Any]:
    strategy = {CHANNEL: "channel", TENSOR: "tensor"}.get(
        form.group_size, "block" if form.blocks else "group"
    )
    weights: dict[str, Any] = {
        "num_bits": form.bits,
        "type": form.kind,
        "symmetric": form.symmetric,
        "strategy": strategy,
        "group_size": form.group_size if strategy == "group" else None,
        "dynamic": False,
    }
    if form.blocks:
        weights["block_structure"] = [form.group_size, form.group_size]
    inputs = form.inputs and {
        "num_bits": 8,
        "type": form.kind,
        "symmetric": True,
        "strategy": form.inputs,
        "dynamic": form.inputs != "tensor",
    }
    if inputs and form.inputs == "group":
        inputs["group_size"] = form.group_size
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": format_of(form),
    }


def activations_of(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Activations | None:
    """To what the settings of one linear round its inputs; None leaves them as they are.

    So they are left, which is finer, where they are asked to have a zero point, to be rounded in groups, or
    to other than 8 bits. One scale for all tokens that is to be found while running becomes one a token.
    """
    asked = settings.get("input_activations") or {}
    kind, strategy = asked.get("type", "int"), asked.get("strategy") or "token"
    plain = asked.get("num_bits") == 8 and asked.get("symmetric", True) and kind in ("int", "float")
    if not plain or strategy not in ("token", "tensor"):
        return None
    if asked.get("dynamic"):
        return Activations(kind)
    scale = tensors.get("input_scale")
    value = float(scale) if scale is not None and scale.numel() == 1 else math.nan
    if not 0 < value < math.inf:
        raise BrokenCheckpoint(
            "input_scale is not one positive number, and inputs are to be rounded by it",
            hint="quantize the model again",
        )
    return Activations(kind, value)
