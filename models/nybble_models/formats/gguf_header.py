"""The head of a GGUF file: metadata, and where each tensor lies. Reads no tensor data."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from nybble_models.errors import BrokenCheckpoint

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """`shape` has the fastest dimension last, as torch has it; `offset` counts from the start of the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Raises `BrokenCheckpoint` for a file that is not GGUF, is cut short, or contradicts itself."""
    try:
        with path.open("rb") as file:
            header = _Reader(file, path.stat().st_size).header()
    except FileNotFoundError:
        raise BrokenCheckpoint(f"{path} is missing", hint="give the path of a .gguf file") from None
    except (struct.error, ValueError, KeyError) as error:
        raise BrokenCheckpoint(
            f"{path} is not a whole GGUF file ({error})", hint="download the file again"
        ) from None
    end = max((t.offset + t.nbytes for t in header.tensors.values()), default=0)
    if end > path.stat().st_size:
        raise BrokenCheckpoint(
            f"{path} is cut short: {end:,} bytes expected, {path.stat().st_size:,} found",
            hint="download the file again",
        )
    return header


class _Reader:
    """Walks the head once. Little-endian, versions 2 and 3 (in which counts have 64 bits)."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size

    def header(self) -> Header:
        if self.file.read(4) != MAGIC:
            raise ValueError("it does not start with GGUF")
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not supported")
        tensors, entries = self._count(), self._count()
        metadata = dict(self._entry() for _ in range(entries))
        found = [self._tensor() for _ in range(tensors)]
        align = int(metadata.get("general.alignment", 32))
        if align <= 0:
            raise ValueError(f"alignment {align}")
        start = -(-self.file.tell() // align) * align
        return Header(metadata, dict(_placed(found, start)))

    def _entry(self) -> tuple[str, Any]:
        name = self._string()
        return name, self._value(self._scalar("I"))

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            return self._array()
        return self._scalar(SCALARS[kind])

    def _array(self) -> list[Any]:
        kind, count = self._scalar("I"), self._count()
        if kind in SCALARS:
            form = f"<{count}{SCALARS[kind]}"
            return list(struct.unpack(form, self.file.read(self._checked(struct.calcsize(form)))))
        return [self._value(kind) for _ in range(count)]

    def _tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name, dimensions = self._string(), self._scalar("I")
        if dimensions > DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(dimensions))[::-1]
        return name, shape, GGMLQuantizationType(self._scalar("I")), self._scalar("Q")

    def _string(self) -> str:
        # llama.cpp cuts some token strings inside a character
        return self.file.read(self._checked(self._scalar("Q"))).decode("utf8", errors="replace")

    def _count(self) -> int:
        return self._checked(self._scalar("Q"))

    def _checked(self, length: int) -> int:
        """No length may pass the end of the file: a hostile one would allocate without bound."""
        if length > self.size - self.file.tell():
            raise ValueError("a length passes the end of the file")
        return length

    def _scalar(self, form: str) -> Any:
        return struct.unpack("<" + form, self.file.read(struct.calcsize("<" + form)))[0]


def _placed(
    found: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]], start: int
) -> Iterator[tuple[str, TensorInfo]]:
    for name, shape, kind, offset in found:
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape and shape[-1] % per_block:
            raise ValueError(f"tensor {name!r}: rows of {shape[-1]} are not whole blocks of {per_block}")
        yield name, TensorInfo(shape, kind, start + offset, prod(shape) // per_block * block_bytes)
