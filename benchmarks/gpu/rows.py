"""Rows of results: one JSON object a line, written as it is measured, each with where it was measured."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import paths

Row = dict[str, Any]
NAME = "gpu.jsonl"


class Rows:
    """Appends to one file; a row is on disk when `write` returns."""

    def __init__(self, folder: Path, part: str, facts: Row) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.part, self.facts = folder / NAME, part, facts

    def write(self, **fields: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        row = {"benchmark": "gpu", "part": self.part, **fields, "when": now, **self.facts}
        with self.path.open("a", encoding="utf8") as sink:
            sink.write(json.dumps(row) + "\n")
            sink.flush()
            os.fsync(sink.fileno())

    def written(self) -> Iterator[Row]:
        """Rows of this part and run that an earlier try left behind."""
        for row in read(self.path):
            if row["run"] == self.facts["run"] and row["part"] == self.part:
                yield row


def read(path: Path) -> list[Row]:
    """Rows of a file; a last line that was cut off is left out."""
    found: list[Row] = []
    for line in path.read_text(encoding="utf8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def spread(samples: Sequence[float], digits: int = 2) -> Row:
    middle = median(samples)
    return {
        "median": round(middle, digits),
        "min": round(min(samples), digits),
        "max": round(max(samples), digits),
    }


def facts(device: str) -> Row:
    """What every row says of its origin. The run and the gate's colour come from the gate."""
    import torch

    found: Row = {
        "device": "cpu",
        "sms": None,
        "l2_bytes": None,
        "driver": None,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "commit": commit(),
        "run": os.environ.setdefault("GPU_GATE_RUN", new_run()),
        "gate": os.environ.get("NYBBLE_GPU_GATE", "not run"),
        "dry": device == "cpu",
    }
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {"device": card.name, "sms": card.multi_processor_count, "l2_bytes": card.L2_cache_size}
        found["driver"] = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found


def new_run() -> str:
    """A name for what is measured together."""
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S")


def version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def output(*command: str) -> str | None:
    """The first line that a tool prints, if it is there and succeeds."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    lines = result.stdout.strip().splitlines()
    return lines[0].strip() if result.returncode == 0 and lines else None


def commit() -> str | None:
    """From the environment, from git, or, where git is missing, from its files."""
    if named := os.environ.get("GPU_GATE_COMMIT") or output(
        "git", "-C", str(paths.ROOT), "rev-parse", "HEAD"
    ):
        return named[:12]
    folder = paths.ROOT / ".git"
    head = folder / "HEAD"
    if not head.is_file():
        return None
    text = head.read_text(encoding="utf8").strip()
    if not text.startswith("ref: "):
        return text[:12]
    named = text.removeprefix("ref: ")
    loose, packed = folder / named, folder / "packed-refs"
    if loose.is_file():
        return loose.read_text(encoding="utf8")[:12]
    lines = packed.read_text(encoding="utf8").splitlines() if packed.is_file() else []
    return next((line[:12] for line in lines if line.endswith(f" {named}")), None)
