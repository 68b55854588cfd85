"""The folder being written: safetensors shards, and nothing visible before all of it is whole."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nybble_models.checkpoint import write_json
from nybble_models.errors import ModelError

SHARD_BYTES = 1 << 30
JOURNAL = ".journal"  # in the folder being written: what a later run goes on from


@contextmanager
def appearing(out: Path, needed: int, key: str) -> Iterator[Path]:
    """A hidden sibling of `out` that takes its name on success.

    A failure removes it. A run that is killed or interrupted leaves it, and so does a disk that becomes full
    where there is a journal; the next run with the same `key` finds it, one with another key removes it.
    `needed` bytes are checked for first. Raises `ModelError` in one line where the disk refuses, or where
    another process writes the same.
    """
    if out.exists():
        raise ModelError(f"{out} exists already", hint="remove it or choose another folder")
    folder = _sibling(out, needed, key)
    claim = _claim(folder)
    if claim is None:
        raise ModelError(f"{out} is being written by another process", hint="wait for it, or stop it")
    try:
        yield folder
        _flush(folder)
        shutil.rmtree(folder / JOURNAL, ignore_errors=True)
        folder.rename(out)
        _flush_entry(out.parent)
    except (OSError, SafetensorError) as error:
        if _is_full(error) and (folder / JOURNAL).is_dir():
            raise _kept(out, folder, needed) from None
        shutil.rmtree(folder, ignore_errors=True)
        raise ModelError(f"cannot write {out}: {error}", hint="is the disk full or read-only?") from None
    except ModelError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(claim)


def _is_full(error: Exception) -> bool:
    """safetensors gives the number of the system's error in its text only."""
    said = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else said and int(said[1])
    return number in (errno.ENOSPC, errno.EDQUOT)


def _kept(out: Path, folder: Path, needed: int) -> ModelError:
    """Leaves the whole files of the journal: the next run makes all others again."""
    for path in (*folder.iterdir(), *(folder / JOURNAL).glob("*.unfinished")):
        if path.is_file():
            path.unlink()
    held = sum(path.stat().st_size for path in (folder / JOURNAL).iterdir())
    more = max(needed - held, 1 << 20)
    return ModelError(
        f"the disk of {out.parent} is full: about {more / 2**20:,.0f} MiB more are needed",
        hint=f"free some space and give the same command again: it goes on from what is kept in {folder}",
    )


def _sibling(out: Path, needed: int, key: str) -> Path:
    folder = out.parent / f".{out.name}.partial-{key}"
    above = next(path for path in out.absolute().parents if path.exists())
    if not above.is_dir():
        raise ModelError(f"{above} is a file", hint="choose a folder that is not below it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out, folder)
        free = shutil.disk_usage(out.parent).free
        if free < needed and not folder.exists():
            raise ModelError(
                f"{out.parent} has {free / 2**20:,.0f} MiB free, about {needed / 2**20:,.0f} MiB are needed",
                hint="free some space or choose another folder",
            )
        folder.mkdir(exist_ok=True)
        return folder
    except OSError as error:
        raise ModelError(f"cannot write to {out.parent}: {error}", hint="choose another folder") from None


def _claim(folder: Path) -> int | None:
    """Lock a folder until the descriptor is closed or the process dies; None where somebody else has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sweep(out: Path, keep: Path) -> None:
    """Remove what other runs left: a folder that nobody has claimed."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        if left == keep:
            continue
        claim = _claim(left)
        if claim is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(claim)


def _flush(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.is_file():
            path.chmod(0o644)  # safetensors makes its files private
            _flush_entry(path)
    _flush_entry(folder)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ShardWriter:
    """Collects tensors and writes a shard whenever `limit` bytes have come together.

    A shard is held in memory until then, once: its file begins with a list of all that is in it. So shards
    are smaller than the 5 GB of other programs, which hold the whole model, and of one size whatever memory
    there is: more of it, or less, changes no byte.
    """

    def __init__(self, folder: Path, limit: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.limit = limit
        self.bytes: dict[str, int] = {}  # by kind: linear, norm, embedding, head
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor, kind: str) -> None:
        if self._pending and self._pending_bytes + tensor.nbytes > self.limit:
            self._write()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes
        self.bytes[kind] = self.bytes.get(kind, 0) + tensor.nbytes

    def extend(self, parts: Mapping[str, tuple[str, Tensor]]) -> None:
        """By name: kind and tensor."""
        for name, (kind, tensor) in parts.items():
            self.add(name, tensor, kind)

    def _write(self) -> None:
        save_file(self._pending, self._path(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard}.safetensors"

    def close(self) -> None:
        """Write what is left and give the shards their final names (and an index if there are several)."""
        self._write()
        if len(self._shards) == 1:
            self._path(0).rename(self.folder / "model.safetensors")
            return
        listing: dict[str, str] = {}
        for shard, names in enumerate(self._shards):
            file = f"model-{shard + 1:05}-of-{len(self._shards):05}.safetensors"
            self._path(shard).rename(self.folder / file)
            listing |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": sum(self.bytes.values())}, "weight_map": listing}
        write_json(self.folder / "model.safetensors.index.json", index)
