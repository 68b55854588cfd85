"""`Record`: one checkpoint's quant_report.json and config.json, read without trusting either."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble_models.checkpoint import REPORT, read_json
from nybble_models.errors import BrokenCheckpoint

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One linear. `output_db` and `weight_db` are signal over noise, 10 log10; None where not measured."""

    name: str
    bits: int | None
    group_size: int | None
    nbytes: int | None
    output_db: float | None
    weight_db: float | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of `nybble eval`; intervals are of 95 %. What was not measured is None."""

    perplexity: float | None = None
    reference_perplexity: float | None = None
    kl_divergence: float | None = None
    kl_interval: tuple[float, float] | None = None
    top1_agreement: float | None = None
    top1_interval: tuple[float, float] | None = None
    text: str = ""
    windows: int | None = None
    length: int | None = None

    @property
    def rise(self) -> float | None:
        """Of the perplexity, over the unquantized model's: 0.05 is 5 %."""
        if self.perplexity is None or not self.reference_perplexity:
            return None
        return self.perplexity / self.reference_perplexity - 1


@dataclass(frozen=True, slots=True)
class Record:
    """`settings` is the `quantization_config`; `calibration` and `versions` are as written, in order.

    The fingerprints of the calibration text are left out: they are for programs.
    """

    name: str
    source: str
    method: str
    settings: Json
    bits_per_weight: float | None
    nbytes: int
    rows: tuple[Row, ...]
    skipped: tuple[str, ...]
    calibration: tuple[tuple[str, str], ...]
    seed: int | None
    versions: tuple[tuple[str, str], ...]
    command: str
    evaluation: Evaluation

    @property
    def output_noise(self) -> float | None:
        """Noise over signal of a linear's output, mean over the linears; None unless all were measured."""
        known = [row.output_db for row in self.rows if row.output_db is not None]
        return sum(10 ** (-db / 10) for db in known) / len(known) if known and self.has_outputs else None

    @property
    def weight_noise(self) -> float | None:
        """The same of the weights themselves."""
        known = [10 ** (-row.weight_db / 10) for row in self.rows if row.weight_db is not None]
        return sum(known) / len(known) if known else None

    @property
    def has_outputs(self) -> bool:
        """Whether the outputs of all linears were measured."""
        return bool(self.rows) and all(row.output_db is not None for row in self.rows)


def read(folder: Path) -> Record:
    """Raises `BrokenCheckpoint` where there is no report, or one that is no JSON object."""
    if not (folder / REPORT).is_file():
        raise BrokenCheckpoint(
            f"{folder} has no {REPORT}", hint="name folders that `nybble quantize` has written"
        )
    report, config = read_json(folder / REPORT), read_json(folder / "config.json")
    return record(folder.absolute().name, report, config)


def record(name: str, report: Json, config: Json) -> Record:
    """Values that are missing or of another type count as not said."""
    layers = report.get("layers")
    sizes = _mapping(report.get("bytes")).values()
    skipped = report.get("skipped")
    return Record(
        name=text(name),
        source=text(report.get("source")),
        method=text(_mapping(report.get("scheme")).get("method")),
        settings=_mapping(config.get("quantization_config")),
        bits_per_weight=number(report.get("bits_per_weight")),
        nbytes=sum(size for size in sizes if integer(size) is not None),
        rows=tuple(_row(_mapping(layer)) for layer in layers) if isinstance(layers, list | tuple) else (),
        skipped=tuple(text(each) for each in skipped) if isinstance(skipped, list | tuple) else (),
        calibration=tuple(pair for pair in _pairs(report.get("calibration")) if pair[0] != "sketch"),
        seed=integer(report.get("seed")),
        versions=_pairs(report.get("versions")),
        command=text(report.get("command")),
        evaluation=_evaluation(_mapping(report.get("evaluation"))),
    )


def _row(layer: Json) -> Row:
    error = number(layer.get("weight_error"))
    return Row(
        name=text(layer.get("name")),
        bits=integer(layer.get("bits")),
        group_size=integer(layer.get("group_size")),
        nbytes=integer(layer.get("bytes")),
        output_db=number(layer.get("output_sqnr_db")),
        weight_db=None if error is None or error < 0 else -20 * math.log10(max(error, 1e-15)),
    )


def _evaluation(said: Json) -> Evaluation:
    return Evaluation(
        perplexity=number(said.get("perplexity")),
        reference_perplexity=number(said.get("reference_perplexity")),
        kl_divergence=number(said.get("kl_divergence")),
        kl_interval=_interval(said.get("kl_interval")),
        top1_agreement=number(said.get("top1_agreement")),
        top1_interval=_interval(said.get("top1_interval")),
        text=text(said.get("text")),
        windows=integer(said.get("windows")),
        length=integer(said.get("length")),
    )


def number(value: object) -> float | None:
    held = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    return held if math.isfinite(held) else None


def integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def text(value: object) -> str:
    """A string that any file can hold: control characters and halves of surrogate pairs are replaced."""
    if not isinstance(value, str):
        return ""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") else c for c in value)


def _interval(value: object) -> tuple[float, float] | None:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (low, high)


def _mapping(value: object) -> Json:
    return value if isinstance(value, dict) else {}


def _pairs(value: object) -> tuple[tuple[str, str], ...]:
    return tuple((text(key), text(str(said))) for key, said in _mapping(value).items())
