"""`Scheme`: how a model is to be quantized, as one frozen record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any, Literal, get_args

from nybble_models.errors import ModelError

Method = Literal["awq", "gptq", "awq+gptq", "rtn", "none"]

CHANNEL = -1
"""Group size that means one scale for a whole row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """`samples` windows of `length` tokens calibrate AWQ and GPTQ; `grid` is how many ratios AWQ tries.

    `skip` holds shell patterns of linears that stay 16-bit ("*.down_proj", "model.layers.0.*").
    Method "none" keeps every weight at 16 bits (a change of container only).
    """

    method: Method = "awq"
    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    clip: bool = True
    samples: int = 16
    length: int = 256
    grid: int = 20
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ModelError(
                f"method {self.method!r} is unknown", hint=f"known: {', '.join(get_args(Method))}"
            )
        if self.group_size != CHANNEL and self.group_size < 1:
            raise ModelError(
                f"group size {self.group_size} is not positive", hint="-1 means one scale for a row"
            )
        limits = {"bits": (2, 8), "samples": (1, 65536), "length": (2, 1 << 20), "grid": (1, 1000)}
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ModelError(f"{name} is {getattr(self, name)}", hint=f"give {low} to {high}")

    def skips(self, name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in self.skip)

    def group(self, inputs: int) -> int:
        """The group size of a linear with this many inputs."""
        return inputs if self.group_size == CHANNEL else self.group_size

    @property
    def folds(self) -> bool:
        """Whether scales are searched and folded (AWQ)."""
        return self.method in ("awq", "awq+gptq")

    @property
    def compensates(self) -> bool:
        """Whether the weights still to be rounded make up for those that are (GPTQ)."""
        return self.method in ("gptq", "awq+gptq")

    @property
    def label(self) -> str:
        """ "awq-w4g64", "rtn-w4g128-sym": what goes into the name of a folder."""
        if self.method == "none":
            return "w16"
        group = "channel" if self.group_size == CHANNEL else f"g{self.group_size}"
        return f"{self.method}-w{self.bits}{group}" + ("-sym" if self.symmetric else "")


PRESETS: Mapping[str, Scheme] = {
    "W4A16": Scheme(),
    "W4A16-g32": Scheme(group_size=32),
    "W4A16-g128": Scheme(group_size=128),
    "W4A16-RTN": Scheme(method="rtn"),
    "W16": Scheme(method="none"),
}


def preset(name: str, **changes: Any) -> Scheme:
    """A preset with some fields changed. Raises `ModelError` for a name that is not one."""
    if name not in PRESETS:
        raise ModelError(f"scheme {name!r} is unknown", hint=f"presets: {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)
