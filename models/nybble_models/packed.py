"""A packed model, and the file that keeps it: the next start reads it instead of packing again.

    file    8 bytes: the size of what follows · a safetensors file of everything small, with a description as
            JSON · the arena, stream after stream

The arena's part is read straight to where a step reads it. The file belongs to one model, one set of settings
and one version of the code: `key` says which, and a file with another key is as good as none.
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
from importlib.metadata import version
from io import BufferedReader
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

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
SHORT = "it is shorter than it says"
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

    embedding: levels of its own, where the model has such · scheme: what was packed, in words.
    """

    arena: Arena
    head: HeldWeight
    layers: Sequence[PackedLayer]
    embedding: HeldWeight | None = None
    scheme: str = ""

    def held(self, tied: bool) -> set[str]:
        """Tables that need not be loaded (`Loader.frame`): the head, also where it is the embedding."""
        if tied:
            return {"embed"} if self.head.integer else set()
        return {"head"}


class PackedFile:
    """Where one model is kept as it was packed under one set of settings."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    @classmethod
    def of(cls, files: Sequence[Path], folder: Path, *settings: object) -> PackedFile:
        """The file in `folder` for a model that lies in `files`, the first of which names it."""
        name = _digest(str(files[0].absolute()), repr(settings))[:16]
        return cls(folder / f"{name}.packed", _digest(repr(_stamps(files)), repr(settings), _code()))

    def read(self) -> PackedModel | None:
        """None where there is no such file, or it is not of this model as it is now."""
        try:
            _tidy(self.path.parent)
            with self.path.open("rb") as file:
                model = self._read(file)
            if model is not None:
                with contextlib.suppress(OSError):
                    os.utime(self.path)
            return model
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, OverflowError, SafetensorError) as error:
            log.warning("%s is not used, and written anew: %s", self.path, error)
            return None

    def _read(self, file: BufferedReader) -> PackedModel | None:
        size = int.from_bytes(file.read(8), "little")
        if size > os.fstat(file.fileno()).st_size:
            raise ValueError(SHORT)
        tensors = load(file.read(size))
        values = json.loads(tensors.pop(DESCRIPTION).numpy().tobytes())
        if values["key"] != self.key:
            return None
        model = _Reading(values, tensors).model()
        for piece in model.arena.pieces():
            if file.readinto(piece) != len(piece):
                raise ValueError(SHORT)
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
            except BaseException:
                beside.unlink(missing_ok=True)
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
        "scheme": model.scheme,
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
        scheme = self._values["scheme"]
        return PackedModel(self._arena, alone["head"], layers, alone.get("embedding"), scheme)


def _stamps(files: Sequence[Path]) -> list[tuple[str, int, int, int]]:
    """Name, size and times: one that is written anew has another time of its change, whatever it claims."""
    seen = [(file.name, file.stat()) for file in files if file.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in seen]


@lru_cache(maxsize=1)
def _code() -> str:
    """A digest of the code that decodes and packs, and of the libraries that it does so with."""
    folders = Path(nybble_kernels.numba.__file__).parents[1], Path(__file__).parent
    texts = (path.read_text("utf8") for folder in folders for path in sorted(folder.rglob("*.py")))
    return _digest(*(version(name) for name in ("torch", "gguf")), *texts)


def _digest(*texts: str) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()
