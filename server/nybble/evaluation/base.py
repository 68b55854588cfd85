"""The unquantized model that a checkpoint was made from, where it is named and this machine has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nybble.prepare import quantized
from nybble_models.checkpoint import REPORT, read_json
from nybble_models.hub import DEFAULT, fetch, name_of


def find_base(model: Path, cache: Path) -> Path | None:
    """By the report's name of it: beside the folder, in the working directory, or the default model."""
    source = _report(model).get("source")
    if not isinstance(source, str) or not source:
        return None
    return next((found for found in _candidates(source, model, cache) if _may_be_base(found, model)), None)


def name_base(model: Path) -> str:
    """What the report calls it, a hub id if there is one; empty where it says nothing."""
    report = _report(model)
    origin = report.get("origin")
    hub_id = origin.get("base_model") if isinstance(origin, dict) else None
    return str(hub_id or report.get("source") or "")


def _may_be_base(found: Path, model: Path) -> bool:
    """A folder or .gguf file that is neither the model itself nor another quantized copy."""
    if found.is_dir() and (found / "config.json").is_file():
        return not (found.samefile(model) or quantized(found))
    return found.is_file() and not found.samefile(model)


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
