"""The papers of a checkpoint: report, model card with its plot, and sums over everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nybble_models.checkpoint import REPORT, read_json
from nybble_models.errors import BrokenCheckpoint
from nybble_quantizers import card, sums
from nybble_quantizers.report import LayerReport, QuantReport


def write(folder: Path, report: QuantReport) -> None:
    """The last to be written: every other file of the checkpoint is there already."""
    report.write(folder)
    card.write(folder, report)
    sums.write(folder)


def read(folder: Path) -> QuantReport:
    """Raises `BrokenCheckpoint` for a report that this version did not write."""
    said = read_json(folder / REPORT)
    try:
        layers = tuple(LayerReport(**layer) for layer in said["layers"])
        return QuantReport(**said | {"skipped": tuple(said["skipped"]), "layers": layers})
    except (KeyError, TypeError) as error:
        raise BrokenCheckpoint(
            f"{folder / REPORT} is of another version ({error})", hint="quantize the model again"
        ) from None


def add_evaluation(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Put figures of `nybble eval` into the report and the card.

    Raises `BrokenCheckpoint`, and changes nothing, where a file is no longer what its sum says.
    """
    changed = sums.check(folder)
    if changed:
        raise BrokenCheckpoint(f"{folder}: {changed[0]}", hint="`nybble verify` lists all that is wrong")
    write(folder, replace(read(folder), evaluation=dict(evaluation)))
