"""What `quantization_config` says of one linear: methods put per-layer settings in places of their own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nybble_models.errors import BrokenCheckpoint

Settings = Mapping[str, Any]


def for_linear(settings: Settings, name: str) -> Settings:
    """The common settings, with those of this linear over them.

    GPTQ's `dynamic` is {"+:regex": changes, "-:regex": {}}, the first match counts. Of the `config_groups` of
    compressed-tensors, one whose target names the linear comes before one that means every Linear.
    """
    if "config_groups" in settings:
        return {**settings, **_group(settings["config_groups"].values(), name)}
    for pattern, changes in (settings.get("dynamic") or {}).items():
        if _matches(pattern.removeprefix("+:").removeprefix("-:"), name):
            return settings if pattern.startswith("-:") else {**settings, **changes}
    return settings


def _group(groups: Iterable[Settings], name: str) -> Settings:
    found = list(groups)
    named = [g for g in found if any(_means(target, name) for target in g.get("targets", ()))]
    general = [g for g in found if "Linear" in g.get("targets", ())]
    return next(iter(named or general or found), {})


def _means(target: str, name: str) -> bool:
    return _matches(target[3:], name) if target.startswith("re:") else target == name


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise BrokenCheckpoint(
            f"quantization_config holds the pattern {pattern!r}, which is none ({error})",
            hint="mend config.json, or download it again",
        ) from None


@dataclass(frozen=True, slots=True)
class Summary:
    """The rule, exceptions aside. `group_size` is None where a row has one scale; unknown is None too."""

    bits: int | None
    group_size: int | None
    symmetric: bool | None
    input_bits: int | None = None  # of the inputs, where they are to be quantized too


def summary(settings: Settings, name: str = "") -> Summary:
    """AWQ, GPTQ and compressed-tensors each spell these in their own way. With a name, of that linear."""
    rule = for_linear(settings, name) if name or "config_groups" in settings else settings
    if "config_groups" in settings:
        weights, inputs = rule.get("weights") or {}, rule.get("input_activations") or {}
        kind = weights.get("num_bits"), weights.get("group_size"), weights.get("symmetric", True)
        return Summary(*kind, inputs.get("num_bits"))
    group = rule.get("group_size")
    symmetric = not rule["zero_point"] if "zero_point" in rule else rule.get("sym")
    return Summary(rule.get("bits"), group if group and group > 0 else None, symmetric)
