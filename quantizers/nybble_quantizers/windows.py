"""What a text is at one place of the model: a matrix per window, all in memory or all in a file.

Windows in memory lie on the device that computes with them, and one that is read from a file is moved there.
Files are read and written by explicit calls, one window at a time: mapped pages would count as memory of the
process. The numbers are float32 in both, so where they are held changes no result.
"""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, overload

import torch
from torch import Tensor

from nybble_models.loader import CPU

WIDTH = 4  # bytes of a float32

A = TypeVar("A")
B = TypeVar("B")


class Windows(Sequence[Tensor]):
    """Matrices [T, K] by number, in memory: a tensor [windows, T, K], which is freed as a whole."""

    def __init__(self, held: Tensor) -> None:
        self._held = held

    def __len__(self) -> int:
        return len(self._held)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        """A window, which the next one put there may overwrite, or a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._read(range(len(self))[index])

    def __setitem__(self, index: int, window: Tensor) -> None:
        self._write(range(len(self))[index], window)

    def _read(self, index: int) -> Tensor:
        return self._held[index]

    def _write(self, index: int, window: Tensor) -> None:
        self._held[index].copy_(window)


class Spilled(Windows):
    """The same, `shape` each, in a file from byte `start` on. It is closed with the last reference.

    device: where a window is to lie that is read.
    """

    def __init__(
        self,
        descriptor: int,
        count: int,
        shape: tuple[int, ...],
        start: int = 0,
        device: torch.device = CPU,
    ) -> None:
        super().__init__(torch.empty(0))
        self._descriptor = descriptor
        self._count = count
        self._shape = shape
        self._start = start
        self._device = device
        weakref.finalize(self, os.close, descriptor)

    def __len__(self) -> int:
        return self._count

    def _read(self, index: int) -> Tensor:
        window = torch.empty(self._shape, device=CPU)
        target = _bytes(window)
        done, at = 0, self._start + index * window.nbytes
        while done < len(target):
            count = os.preadv(self._descriptor, [target[done:]], at + done)
            if count == 0:
                raise OSError("a file of states ends too early")
            done += count
        return window.to(self._device)

    def _write(self, index: int, window: Tensor) -> None:
        if tuple(window.shape) != self._shape:
            raise ValueError(f"a window of {list(window.shape)} among those of {list(self._shape)}")
        source = _bytes(window)
        done, at = 0, self._start + index * len(source)
        while done < len(source):
            done += os.pwrite(self._descriptor, source[done:], at + done)


class Place(Protocol):
    """Where windows are put: `place(count, (T, K))` makes room for them."""

    def __call__(self, count: int, shape: tuple[int, ...], /) -> Windows: ...


def held_on(device: torch.device) -> Place:
    return lambda count, shape: Windows(torch.empty(count, *shape, device=device))


in_memory = held_on(CPU)


def spilled_to(folder: Path, device: torch.device = CPU) -> Place:
    """Files without a name: a process that is killed leaves none."""

    def place(count: int, shape: tuple[int, ...]) -> Windows:
        with tempfile.TemporaryFile(dir=folder) as file:
            return Spilled(os.dup(file.fileno()), count, shape, device=device)

    return place


class Seen(Sequence[B], Generic[A, B]):
    """Windows through a function, computed whenever one is looked at: nothing is held."""

    def __init__(self, source: Sequence[A], function: Callable[[A], B]) -> None:
        self._source = source
        self._function = function

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, index: int) -> B: ...
    @overload
    def __getitem__(self, index: slice) -> list[B]: ...
    def __getitem__(self, index: int | slice) -> B | list[B]:
        if isinstance(index, slice):
            return [self._function(each) for each in self._source[index]]
        return self._function(self._source[index])


def save(path: Path, kept: Mapping[str, Windows]) -> None:
    """As a .safetensors file of [windows, T, K], a window at a time. `path` appears when it is whole."""
    header: dict[str, Any] = {}
    end = 0
    for name, windows in kept.items():
        shape = [len(windows), *windows[0].shape]
        start, end = end, end + WIDTH * len(windows) * windows[0].numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for windows in kept.values():
            for window in windows:
                file.write(_bytes(window))
    os.replace(unfinished, path)


def load(path: Path) -> dict[str, Windows]:
    """What `save` wrote; windows are read when they are asked for."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        return {
            name: Spilled(
                os.dup(file.fileno()),
                row["shape"][0],
                tuple(row["shape"][1:]),
                8 + size + row["data_offsets"][0],
            )
            for name, row in header.items()
        }


def _bytes(window: Tensor) -> memoryview:
    """As float32. Of a window that is that already, here and in one piece, its own."""
    return window.float().cpu().contiguous().numpy().data.cast("B")
