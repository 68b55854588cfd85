"""How a model is to be quantized, as flags of `nybble quantize`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from nybble.errors import UsageError

UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is None is as the preset says."""

    scheme: Annotated[
        str | None,
        Parameter(help="W4A16 (default), W8A8, W8A8-static, FP8, FP8-static ...; flags change it"),
    ] = None
    method: Annotated[
        Literal["awq", "gptq", "awq+gptq", "rtn", "smoothquant", "smoothquant+gptq"] | None,
        Parameter(help="how to choose the codes (default awq; smoothquant: W8A8)"),
    ] = None
    bits: Annotated[int | None, Parameter(help="bits per weight (default 4)")] = None
    group_size: Annotated[
        int | None,
        Parameter(help="weights that share a scale (default 64); -1: a whole row, 0 (rtn): the whole matrix"),
    ] = None
    symmetric: Annotated[bool | None, Parameter(help="leave out zero points", negative="--asymmetric")] = None
    quality: Annotated[
        Literal["fast", "best"],
        Parameter(help="best: then tune levels, scales and norms by gradient, many times as long"),
    ] = "fast"
    steps: Annotated[int, Parameter(help="of --quality best")] = 100
    alpha: Annotated[
        float | None, Parameter(help="how much of their range inputs pass to weights; else it is searched")
    ] = None
    order: Annotated[
        Literal["groups", "columns", "desc_act", "none"],
        Parameter(help="of GPTQ's inputs; desc_act is the classic one, which kernels must undo at run time"),
    ] = "groups"
    mse: Annotated[bool, Parameter(help="with rtn: search every range for the least error", negative=())] = (
        False
    )
    damp: Annotated[float, Parameter(help="first damping of GPTQ; it rises by itself")] = 0.01
    format: Annotated[
        Literal["auto", "awq", "gptq", "gptq_v2", "compressed-tensors"],
        Parameter(help="of the output; auto: awq if it can hold the result, else compressed-tensors"),
    ] = "auto"
    override: Annotated[
        tuple[str, ...],
        Parameter(
            help="other bits for some linears, as *.down_proj=8 or *.o_proj=4g32 or *=16",
            negative=(),
            consume_multiple=True,
        ),
    ] = ()
    target_bits: Annotated[
        float | None, Parameter(help="choose the bits of each linear, so many on average")
    ] = None
    target_size: Annotated[
        str | None, Parameter(help="the same for a size of the weights, as 80MB or 1.2GB")
    ] = None
    widths: Annotated[
        tuple[int, ...],
        Parameter(
            help="bits a target chooses from, beside 16; other engines' kernels often know 4 and 8 only",
            negative=(),
            consume_multiple=True,
        ),
    ] = (3, 4, 5, 6, 8)
    embeddings: Annotated[
        bool, Parameter(help="round the embedding and the head too, to 8 bits or as the target says")
    ] = False
    samples: Annotated[int, Parameter(help="windows of text to calibrate on")] = 16
    length: Annotated[int, Parameter(help="tokens in a window")] = 256
    skip: Annotated[
        tuple[str, ...],
        Parameter(
            help="linears to leave at 16 bits, as *.down_proj; wins over --override",
            negative=(),
            consume_multiple=True,
        ),
    ] = ()

    @property
    def preset(self) -> str:
        """SmoothQuant by itself means W8A8."""
        return self.scheme or ("W8A8" if (self.method or "").startswith("smoothquant") else "W4A16")

    def changes(self) -> dict[str, Any]:
        """The fields of a `Scheme` that are not the preset's. Raises `UsageError` for a size that is none."""
        named = ("method", "bits", "group_size", "symmetric", "alpha", "target_bits")
        given = {name: getattr(self, name) for name in named if getattr(self, name) is not None}
        if self.target_size is not None:
            given = {"target_bits": None} | given | {"target_bytes": in_bytes(self.target_size)}
        return given | {
            "widths": self.widths,
            "order": self.order,
            "mse": self.mse,
            "damp": self.damp,
            "best": self.quality == "best",
            "steps": self.steps,
            "format": self.format,
            "overrides": self.override,
            "skip": self.skip,
            "ends": self.embeddings,
            "samples": self.samples,
            "length": self.length,
        }


USUAL = Recipe()


def in_bytes(text: str) -> int:
    """ "80MB", "1.2 GiB", "5e6" -> bytes."""
    found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*(|[kmg]i?)b?\s*", text.lower())
    try:
        return int(float(found[1]) * UNITS[found[2]]) if found else _no_size(text)
    except ValueError:
        return _no_size(text)


def _no_size(text: str) -> int:
    raise UsageError(f"{text!r} is not a size", hint="as 80MB, 1.2GB or 8GiB")
