"""The unquantized model that a checkpoint was made from, where it is named and this machine has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nybble_models.checkpoint import read_json
from nybble_models.hub import DEFAULT, fetch, name_of

REPORT = "quant_report.json"


def find_base(model: Path, cache: Path) -> Path | None:
    """By the report's name of it: beside the folder, in the working directory, or the default model."""
    source = _report(model).get("source")
    if not isinstance(source, str) or not source:
        return None
    return next((found for found in _candidates(source, model, cache) if found.exists()), None)


def name_base(model: Path) -> str:
    """What the report calls it, a hub id if there is one; empty where it says nothing."""
    report = _report(model)
    origin = report.get("origin")
    hub_id = origin.get("base_model") if isinstance(origin, dict) else None
    return str(hub_id or report.get("source") or "")


def _report(model: Path) -> Mapping[str, Any]:
    path = model / REPORT
    return read_json(path) if path.is_file() else {}


def _candidates(source: str, model: Path, cache: Path) -> Iterator[Path]:
    yield model.resolve().parent / source
    yield Path(source)
    if name_of(source).startswith(name_of(DEFAULT)):
        default = fetch(DEFAULT, cache)
        if default.name == source:
            yield default
