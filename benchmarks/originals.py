"""Weights as models were given out before safetensors, in files that nybble reads.

nybble opens no pickle. This script's user names the weights himself, and PyTorch takes nothing but tensors
from them.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nybble_models.checkpoint import INDEX, write_json
from nybble_models.errors import BrokenCheckpoint

PICKLED = "pytorch_model*.bin"  # other .bin files are states of training
ZIP = b"PK\x03\x04"  # how the files begin that PyTorch can map; those from before its 1.6 are read whole


def as_safetensors(folder: Path, cache: Path) -> Path:
    """The folder, or where it holds .bin files and no safetensors, a copy in the cache that does.

    Raises `BrokenCheckpoint` for a file that is damaged or would run code.
    """
    files = sorted(folder.glob(PICKLED)) if folder.is_dir() else []
    if not files or any(folder.glob("*.safetensors")):
        return folder
    stamps = "".join(f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}\n" for file in files)
    made = cache / "originals" / f"{folder.name}-{hashlib.sha256(stamps.encode()).hexdigest()[:8]}"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".copy-", dir=made.parent) as fleeting:
            work = Path(fleeting) / "model"
            work.mkdir()
            _copy(folder, files, work)
            work.rename(made)
    return made


def _copy(folder: Path, files: list[Path], out: Path) -> None:
    where: dict[str, str] = {}
    for number, file in enumerate(files, start=1):
        shard = f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = _apart(tensors_of(file))
        save_file(tensors, out / shard, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, shard)
    write_json(out / INDEX, {"metadata": {}, "weight_map": where})
    for path in folder.iterdir():
        if (
            path.is_file()
            and path.suffix in (".json", ".txt", ".model", ".jinja")
            and "index" not in path.name
        ):
            shutil.copyfile(path, out / path.name)


def _apart(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole names, as a model that was saved without its head leaves off "model."; no memory is shared."""
    made: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in held.items():
        plain = tensor.contiguous()
        place = plain.untyped_storage().data_ptr()
        whole = name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
        made[whole] = plain.clone() if place in seen else plain
        seen.add(place)
    return made


def tensors_of(path: Path) -> dict[str, Tensor]:
    """What `torch.save` wrote of a state dict. Raises `BrokenCheckpoint`."""
    try:
        with path.open("rb") as file:
            mapped = file.read(len(ZIP)) == ZIP
        with warnings.catch_warnings(action="ignore"):  # it warns of what it then refuses
            held = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise _refused(path, error) from None
    if not isinstance(held, dict):
        raise BrokenCheckpoint(f"{path} does not hold tensors by name", hint="download the file again")
    return {name: each.detach() for name, each in held.items() if isinstance(each, Tensor)}


def _refused(path: Path, error: Exception) -> BrokenCheckpoint:
    """PyTorch's own words on a pickle are many lines, and advise to run its code."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code is not None:
        return BrokenCheckpoint(
            f"{path} holds more than tensors: {code[1]!r} would be run to read it, and is not",
            hint="take the weights as safetensors",
        )
    return BrokenCheckpoint(f"{path} is not a whole PyTorch file", hint="download the file again")
