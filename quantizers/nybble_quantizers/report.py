"""What a quantization run did: progress while it runs, `quant_report.json` when it is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from nybble_kernels.float8 import Float8Tensor
from nybble_models.checkpoint import REPORT, write_json
from nybble_models.formats.form import Form
from nybble_models.weights import Block, Linear
from nybble_quantizers.block import Finding
from nybble_quantizers.folding import float_weight
from nybble_quantizers.origin import Origin

LIBRARIES = ("nybble", "torch", "transformers", "safetensors", "gguf")

Stage = Literal["calibrate", "choose", "quantize", "tune", "write"]


@dataclass(frozen=True, slots=True)
class QuantizeProgress:
    """`done` of `total`: positions while calibrating, blocks passed while choosing, blocks while quantizing.

    `layers` tells of the linears of the block that was just done.
    """

    stage: Stage
    done: int
    total: int
    seconds_left: float | None = None
    layers: tuple[LayerReport, ...] = ()


Listener = Callable[[QuantizeProgress], None]


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One linear. `weight_error` is the relative RMS of the folded weight's rounding; `output_sqnr_db` the
    signal over noise of the linear's output on the calibration text; `ratio` the exponent of the scale that
    was folded into its input (None: no scale was better); `clip_share` the groups whose range was narrowed;
    `damp` what GPTQ added to the diagonal of the Hessian, as a share of its mean.
    """

    name: str
    bits: int
    group_size: int
    bytes: int
    weight_error: float
    output_sqnr_db: float | None = None
    ratio: float | None = None
    duo: bool = False
    clip_share: float | None = None
    damp: float | None = None


@dataclass(frozen=True, slots=True)
class QuantReport:
    """What was made, of what, by which command. Times are left out: same seed, same bytes."""

    source: str
    scheme: dict[str, Any]
    seed: int
    calibration: dict[str, Any] | None
    versions: dict[str, str]
    command: str
    bytes: dict[str, int]
    bits_per_weight: float
    skipped: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    origin: Origin = field(default_factory=dict)  # what the source says of itself
    evaluation: dict[str, Any] | None = None  # figures of `nybble eval`

    def write(self, directory: Path) -> None:
        write_json(directory / REPORT, asdict(self))


def layer_report(name: str, folded: Linear, quantized: Linear, found: Finding) -> LayerReport:
    """Measure one rounded linear against the weight that was rounded."""
    weight, made = float_weight(folded), quantized.weight
    if isinstance(made, Tensor):
        raise TypeError(f"{name} was not quantized")
    missed = made.dequantize() - weight
    error = float(missed.square().mean().sqrt() / weight.square().mean().sqrt().clamp(min=1e-30))
    sqnr = None if found.noise is None else -10 * math.log10(max(found.noise, 1e-30))
    return LayerReport(
        name,
        8 if isinstance(made, Float8Tensor) else made.bits,
        made.group_size,
        made.nbytes,
        error,
        sqnr,
        found.ratio,
        found.duo,
        found.clip_share,
        found.damp,
    )


def block_reports(
    names: Mapping[str, str],
    forms: Mapping[str, Form],
    folded: Block,
    quantized: Block,
    findings: Mapping[str, Finding],
) -> list[LayerReport]:
    """A row for each linear of a block that has a form. names: the full ones by projection, in order."""
    return [
        layer_report(name, folded.linears[p], quantized.linears[p], findings.get(p, Finding()))
        for p, name in names.items()
        if p in forms
    ]


def versions() -> dict[str, str]:
    """Of the libraries that decide what is written."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # run from the source tree
            found[library] = "source"
    return found
