"""Weights that are packed already: what they are in plain values, and back, so that a file can hold them.

Their blocks are the arena's, and are stored with it: rooms that are taken again in the same order lie where
they lay (`Arena.pieces`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from nybble_kernels.numba.arena import Arena, Room
from nybble_kernels.numba.layout import Format
from nybble_kernels.numba.packing import Packed
from nybble_kernels.numba.weight import FloatWeight, HeldWeight, QuantizedWeight

NUMBERS = ("outputs", "inputs", "groups", "subs", "bits", "group_size")
TENSORS = ("columns", "permutation")


def described(weight: HeldWeight) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A weight without its blocks: values that JSON holds, and small tensors by name."""
    if isinstance(weight, FloatWeight):
        return _sizes(weight.room) | {"outputs": weight.outputs, "inputs": weight.inputs}, {}
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"no form for {type(weight).__name__}")
    packed = weight.packed
    values = _sizes(packed.room) | {name: getattr(packed, name) for name in NUMBERS}
    tensors = {name: getattr(packed, name) for name in TENSORS}
    return values | {"form": asdict(packed.form)}, {n: t for n, t in tensors.items() if t is not None}


def placed(values: Mapping[str, Any], tensors: Mapping[str, Tensor], arena: Arena) -> HeldWeight:
    """The weight that was described, in the arena's next room, whose blocks are for the caller to fill."""
    room = arena.room(values["blocks"], values["size"])
    if "form" not in values:
        return FloatWeight(room, values["outputs"], values["inputs"])
    numbers = {name: values[name] for name in NUMBERS}
    columns, permutation = (tensors.get(name) for name in TENSORS)
    form = Format(**values["form"])
    packed = Packed(room=room, form=form, columns=columns, permutation=permutation, **numbers)
    return QuantizedWeight(packed)


def _sizes(room: Room) -> dict[str, Any]:
    return {"blocks": room.blocks, "size": int(room.data.shape[3])}
