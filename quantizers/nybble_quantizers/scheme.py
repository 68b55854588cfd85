"""`Scheme`: how a model is to be quantized, as one frozen record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any, Literal, get_args

from nybble_models.errors import ModelError
from nybble_models.formats.container import Container, container
from nybble_models.formats.form import CHANNEL, TENSOR, Form

Method = Literal["awq", "gptq", "awq+gptq", "rtn", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """`samples` windows of `length` tokens calibrate AWQ and GPTQ; `grid` is how many ratios AWQ tries.

    `skip` holds shell patterns of linears that stay 16-bit ("*.down_proj", "model.layers.0.*"). `format` is
    a name of `CONTAINERS`, or "auto": AWQ where it can hold the form, else compressed-tensors.
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
    format: str = "auto"

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ModelError(
                f"method {self.method!r} is unknown", hint=f"known: {', '.join(get_args(Method))}"
            )
        if self.group_size < CHANNEL or (self.group_size == TENSOR and self.method != "rtn"):
            raise ModelError(
                f"group size {self.group_size} is not positive",
                hint="-1 means one scale for a row; 0, with method rtn, one for the whole matrix",
            )
        if self.format != "auto":
            container(self.format)
        limits = {"bits": (2, 8), "samples": (1, 65536), "length": (2, 1 << 20), "grid": (1, 1000)}
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ModelError(f"{name} is {getattr(self, name)}", hint=f"give {low} to {high}")

    def skips(self, name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in self.skip)

    @property
    def form(self) -> Form | None:
        """How a linear is stored unless something else is said of it; None: at 16 bits."""
        if self.method == "none":
            return None
        return Form(self.bits, self.group_size, self.symmetric)

    @property
    def container(self) -> Container:
        if self.format != "auto":
            return container(self.format)
        plain = self.form is None or (self.form.bits == 4 and self.form.group_size != TENSOR)
        return container("awq" if plain else "compressed-tensors")

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
        return "w16" if self.form is None else f"{self.method}-{self.form.label}"


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
