"""A packed model, and the file that keeps it: the next start reads it instead of packing again.

    file    8 bytes: the size of what follows · a safetensors file of everything small, with a description as
            JSON · the arena, stream after stream

The arena's part is read straight to where a step reads it. The file belongs to one model, one version of the
code and one number of threads: `key` says which, and a file with another key is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

import nybble_kernels.numba
from nybble_kernels.numba.arena import Arena
from nybble_kernels.numba.stored import described, placed
from nybble_kernels.numba.weight import HeldWeight
from nybble_models.weights import Norm

log = logging.getLogger("nybble.engine")

SMALLEST = 1 << 24  # bytes: less is packed as fast as it is read
SPARE = 1 << 30  # bytes of the disk that are left to others
UNUSED, KILLED = 30 * 24 * 3600, 3600  # seconds after which a file of another model goes, and half a file
PART = ".part"
DESCRIPTION = "description"


@dataclass(frozen=True)
class PackedPart:
    """One product of a layer: a projection, or partners stacked. bias: float [outputs] or None."""

    weight: HeldWeight
    bias: Tensor | None = None


@dataclass(frozen=True)
class PackedLayer:
    """Norms by role, and the parts of every stack ("qkv", "o", "gate_up", "down")."""

    norms: dict[str, Norm]
    stacks: dict[str, list[PackedPart]]

    def parts(self, stack: str) -> Sequence[PackedPart]:
        return self.stacks[stack]


@dataclass(frozen=True)
class PackedModel:
    """Everything that a program reads from the arena, and what goes with it.

    embedding: levels of its own, where the model has such.
    """

    arena: Arena
    head: HeldWeight
    layers: Sequence[PackedLayer]
    embedding: HeldWeight | None = None


class PackedFile:
    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    @classmethod
    def of(cls, source: Path, folder: Path, *settings: object) -> PackedFile:
        """The file in `folder` for a model (a folder or a GGUF file), packed under some settings."""
        name = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:16]
        return cls(folder / f"{name}.packed", _digest(repr((_stamps(source), settings, _code()))))

    def read(self) -> PackedModel | None:
        """None where there is no such file, or it is not of this model as it is now."""
        try:
            with self.path.open("rb") as file:
                model = self._read(file)
            if model is not None:
                os.utime(self.path)
            return model
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, OverflowError, SafetensorError) as error:
            log.warning("%s is not used, and written anew: %s", self.path, error)
            return None

    def _read(self, file: BinaryIO) -> PackedModel | None:
        tensors = load(file.read(int.from_bytes(file.read(8), "little")))
        described = json.loads(tensors.pop(DESCRIPTION).numpy().tobytes())
        if described["key"] != self.key:
            return None
        model = _Reading(described, tensors).model()
        for piece in model.arena.pieces():
            if file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
                raise ValueError("it is shorter than it says")
        return model

    def write(self, model: PackedModel) -> None:
        """Appears whole or not at all. A disk that is full or cannot be written is no reason not to serve."""
        size = sum(len(piece) for piece in model.arena.pieces())
        if size < SMALLEST:
            return
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _tidy(folder)
            if shutil.disk_usage(folder).free < size + SPARE:
                raise OSError(f"{folder} has less than {(size + SPARE) / 1e9:.1f} GB left")
            self._write(folder, model)
        except OSError as error:
            log.warning("the packed model is not kept for the next start: %s", error)

    def _write(self, folder: Path, model: PackedModel) -> None:
        with NamedTemporaryFile(dir=folder, suffix=PART, delete=False) as file:
            beside = Path(file.name)
            try:
                small = _small(model, self.key)
                file.write(len(small).to_bytes(8, "little") + small)
                for piece in model.arena.pieces():
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
                beside.replace(self.path)
            except OSError:
                beside.unlink()
                raise


def _tidy(folder: Path) -> None:
    """Models that nobody serves any more, and what a start that was killed left."""
    for file in folder.iterdir():
        with contextlib.suppress(OSError):
            age = time.time() - file.stat().st_mtime
            if age > (KILLED if file.suffix == PART else UNUSED):
                file.unlink()


def _small(model: PackedModel, key: str) -> bytes:
    """The safetensors part. Weights are listed in the order in which they were packed."""
    tensors: dict[str, Tensor] = {}
    weights: list[dict[str, Any]] = []

    def add(name: str, weight: HeldWeight) -> None:
        values, held = described(weight)
        weights.append(values | {"name": name})
        tensors.update(
            {
                f"{name}.{each}": tensor.clone(memory_format=torch.contiguous_format)
                for each, tensor in held.items()
            }
        )

    add("head", model.head)
    for number, layer in enumerate(model.layers):
        for role, norm in layer.norms.items():
            tensors |= _named(f"{number}.norm.{role}", weight=norm.weight, bias=norm.bias)
        for stack, parts in layer.stacks.items():
            for i, part in enumerate(parts):
                add(f"{number}.{stack}.{i}", part.weight)
                tensors |= _named(f"{number}.{stack}.{i}", bias=part.bias)
    if model.embedding is not None:
        add("embedding", model.embedding)
    values = {
        "key": key,
        "reserve": model.arena.reserve,
        "threads": model.arena.threads,
        "layers": len(model.layers),
        "weights": weights,
    }
    text = torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
    return bytes(save({**tensors, DESCRIPTION: text}))


def _named(name: str, **tensors: Tensor | None) -> dict[str, Tensor]:
    return {
        f"{name}.{each}": tensor.clone(memory_format=torch.contiguous_format)
        for each, tensor in tensors.items()
        if tensor is not None
    }


class _Reading:
    """The way back from `_small`."""

    def __init__(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._values = values
        self._arena = Arena(values["reserve"], values["threads"])
        self._tensors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            owner, _, last = name.rpartition(".")
            self._tensors.setdefault(owner, {})[last] = tensor

    def model(self) -> PackedModel:
        layers = [PackedLayer({}, {}) for _ in range(self._values["layers"])]
        alone: dict[str, HeldWeight] = {}
        for values in self._values["weights"]:
            tensors = self._tensors.get(values["name"], {})
            weight = placed(values, tensors, self._arena)
            number, _, rest = values["name"].partition(".")
            if rest:
                part = PackedPart(weight, tensors.get("bias"))
                layers[int(number)].stacks.setdefault(rest.partition(".")[0], []).append(part)
            else:
                alone[number] = weight
        for owner, tensors in self._tensors.items():
            number, _, role = owner.partition(".norm.")
            if role:
                layers[int(number)].norms[role] = Norm(**tensors)
        return PackedModel(self._arena, alone["head"], layers, alone.get("embedding"))


def _stamps(source: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of whatever a loader reads."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    read = [file for file in files if file.suffix in (".safetensors", ".json", ".gguf")]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in read]


@lru_cache(maxsize=1)
def _code() -> str:
    """A digest of the code that decodes and packs."""
    folders = Path(nybble_kernels.numba.__file__).parents[1], Path(__file__).parent
    return _digest(*(path.read_text("utf8") for folder in folders for path in sorted(folder.rglob("*.py"))))


def _digest(*texts: str) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()
