"""What of a run is done, block by block: the same command after a crash goes on where it stood."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nybble_models.checkpoint import read_json, write_json
from nybble_models.formats.form import Form
from nybble_quantizers import windows
from nybble_quantizers.calibrate import Calibration
from nybble_quantizers.report import LayerReport, versions
from nybble_quantizers.windows import Windows

Stored = Mapping[str, tuple[str, Tensor]]
"""By full name: the kind ("linear", "norm", ...) and the tensor."""


class Journal:
    """Files in a folder: the calibration text, each finished block, and the text's state after the last.

    A file appears under its name only when it is whole. What cannot be read counts as not done.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.final = self._block  # what is made of the checkpoint: blocks as rounded, or as tuned after that
        folder.mkdir(exist_ok=True)

    def done(self, stateful: bool) -> int:
        """How many blocks need not be done again; `stateful`: whether the next one needs the states."""
        count = 0
        while self._whole(self._block(count)):
            count += 1
        while stateful and count and not self._whole(self._states(count - 1)):
            count -= 1
        return count

    def calibration(self) -> Calibration | None:
        path = self.folder / "calibration.safetensors"
        if not self._whole(path):
            return None
        facts = self._facts(path)
        return Calibration(load_file(path)["tokens"], facts["origin"], tuple(facts["sketch"]))

    def keep_calibration(self, found: Calibration) -> None:
        facts = {"origin": found.origin, "sketch": found.sketch}
        self._write(self.folder / "calibration.safetensors", {"tokens": found.tokens}, facts)

    def forms(self) -> dict[str, Form | None] | None:
        """What was chosen for each linear, by its name."""
        path = self.folder / "forms.json"
        if not path.is_file():
            return None
        return {name: None if form is None else Form(**form) for name, form in read_json(path).items()}

    def keep_forms(self, forms: Mapping[str, Form | None]) -> None:
        unfinished = self.folder / "forms.unfinished"
        write_json(unfinished, {name: None if form is None else asdict(form) for name, form in forms.items()})
        os.replace(unfinished, self.folder / "forms.json")

    def keep(
        self, layer: int, stored: Stored, reports: list[LayerReport], states: Mapping[str, Windows]
    ) -> None:
        """A block is done. The states come first: a block without them could not be followed by another."""
        if states:
            windows.save(self._states(layer), states)
        self._keep(self._block(layer), stored, reports)
        self._states(layer - 1).unlink(missing_ok=True)

    def _keep(self, path: Path, stored: Stored, reports: list[LayerReport]) -> None:
        facts = {
            "kinds": {name: kind for name, (kind, _) in stored.items()},
            "reports": [asdict(report) for report in reports],
        }
        self._write(path, {name: tensor for name, (_, tensor) in stored.items()}, facts)

    def keep_whole(self, layer: int, weights: Mapping[str, Tensor]) -> None:
        """A block's linears before they were rounded, by projection."""
        self._write(self.folder / f"whole-{layer:05}.safetensors", weights, {})

    def whole(self, layer: int) -> dict[str, Tensor]:
        return load_file(self.folder / f"whole-{layer:05}.safetensors")

    def keep_tuned(self, layer: int, stored: Stored, reports: list[LayerReport]) -> None:
        """A block once more, after it was tuned: it counts when all of them are there."""
        self._keep(self._tuned(layer), stored, reports)

    def taught(self, layers: int) -> bool:
        """Whether every block was tuned; if so, these are final."""
        done = all(self._whole(self._tuned(layer)) for layer in range(layers))
        self.final = self._tuned if done else self._block
        return done

    def names(self, layer: int) -> list[str]:
        """Of the tensors of a finished block."""
        return list(self._facts(self._block(layer))["kinds"])

    def tensor(self, layer: int, name: str) -> Tensor:
        with safe_open(self._block(layer), framework="pt") as file:
            found: Tensor = file.get_tensor(name)
            return found

    def states(self, layer: int) -> dict[str, Windows]:
        """As kept with block `layer`, to be read window by window."""
        return windows.load(self._states(layer))

    def reports(self, layer: int) -> list[LayerReport]:
        return [LayerReport(**row) for row in self._facts(self.final(layer))["reports"]]

    def stored(self, layer: int) -> dict[str, tuple[str, Tensor]]:
        path = self.final(layer)
        kinds, tensors = self._facts(path)["kinds"], load_file(path)
        return {name: (kinds[name], tensors[name]) for name in kinds}

    def _block(self, layer: int) -> Path:
        return self.folder / f"block-{layer:05}.safetensors"

    def _tuned(self, layer: int) -> Path:
        return self.folder / f"tuned-{layer:05}.safetensors"

    def _states(self, layer: int) -> Path:
        return self.folder / f"states-{layer:05}.safetensors"

    def _write(self, path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        unfinished = path.with_suffix(".unfinished")
        save_file(dict(tensors), unfinished, metadata={"facts": json.dumps(facts)})
        os.replace(unfinished, path)

    def _whole(self, path: Path) -> bool:
        try:
            with safe_open(path, framework="pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def _facts(self, path: Path) -> Any:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["facts"])


def fingerprint(text: str | None) -> object:
    """Of a calibration text as the user names it: what changes when the file does, or its name in the hub."""
    path = None if text is None else Path(text).expanduser()
    if path is None or not path.is_file():
        return text
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns


def key_of(source: Path, *settings: object) -> str:
    """Names a run: the same source, settings and libraries give the same key, anything else another."""
    files = [source] if source.is_file() else sorted(f for f in source.iterdir() if f.is_file())
    seen = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    text = repr((str(source.resolve()), seen, settings, versions()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
