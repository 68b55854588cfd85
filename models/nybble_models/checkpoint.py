"""A checkpoint on disk: its config, its tensors by name, and which codec reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nybble_models.errors import BrokenCheckpoint

REPORT = "quant_report.json"  # beside the weights of a checkpoint that was quantized here


INDEX = "model.safetensors.index.json"


class Checkpoint:
    """A Hugging Face folder: `config.json` and safetensors shards, read lazily and by name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = read_config(directory)
        self._shards: dict[Path, Any] = {}
        self.index = self._read_index()

    def _read_index(self) -> dict[str, Path]:
        listing = self.directory / INDEX
        if listing.exists():
            entries = read_json(listing).get("weight_map", {})
            shards = {str(file): self._shard_path(str(file)) for file in set(entries.values())}
            return {name: shards[str(file)] for name, file in entries.items()}
        single = self.directory / "model.safetensors"
        others = sorted(self.directory.glob("*.safetensors"))
        if not single.exists() and len(others) == 1:
            single = others[0]  # AutoGPTQ wrote "gptq_model-4bit-128g.safetensors"
        if not single.exists():
            raise BrokenCheckpoint(
                f"{self.directory} has no model.safetensors and no index of shards",
                hint="give a folder with safetensors weights or a .gguf file",
            )
        return dict.fromkeys(self._open(single).keys(), single)

    def _shard_path(self, file: str) -> Path:
        if Path(file).name != file:
            raise BrokenCheckpoint(
                f"model.safetensors.index.json names {file!r}, which is outside the folder",
                hint="shards must lie beside their index",
            )
        if not (self.directory / file).exists():
            raise _missing(self.directory / file)
        return self.directory / file

    def _open(self, path: Path) -> Any:
        if path not in self._shards:
            try:
                self._shards[path] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise _missing(path) from None
            except SafetensorError as error:
                raise BrokenCheckpoint(
                    f"{path} is not a whole safetensors file ({error})", hint="download the file again"
                ) from None
        return self._shards[path]

    def __contains__(self, name: str) -> bool:
        return name in self.index

    def names(self) -> Iterator[str]:
        return iter(self.index)

    def tensor(self, name: str) -> Tensor:
        """Raises `BrokenCheckpoint` when the tensor is not there."""
        if name not in self.index:
            raise BrokenCheckpoint(
                f"{self.directory} has no tensor {name!r}", hint="is the config from another model?"
            )
        try:
            tensor: Tensor = self._open(self.index[name]).get_tensor(name)
        except SafetensorError as error:
            raise BrokenCheckpoint(
                f"{self.index[name]} does not hold {name!r} ({error})", hint="download the file again"
            ) from None
        return tensor

    def release(self) -> None:
        """Let go of the files: pages of them that were read count as memory of the process until then."""
        self._shards.clear()

    def files(self) -> list[Path]:
        """Settings and shards."""
        settings = ("config.json", *BESIDE, INDEX)
        return [*(self.directory / name for name in settings), *sorted(set(self.index.values()))]

    def levels(self, name: str) -> None:
        """Numbers only: what levels are made of has several names, and a codec reads them."""


BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where AutoGPTQ and AutoAWQ once put what belongs into `quantization_config`, and the method it is of."""

RENAMED = {"w_bit": "bits", "q_group_size": "group_size"}


def read_config(directory: Path) -> dict[str, Any]:
    """config.json, with the settings of a quantized model wherever they lie. Raises `BrokenCheckpoint`."""
    config = read_json(directory / "config.json")
    for name, method in BESIDE.items():
        if not config.get("quantization_config") and (directory / name).is_file():
            said = {RENAMED.get(key, key): value for key, value in read_json(directory / name).items()}
            config["quantization_config"] = {"quant_method": method} | said
    return config


def _missing(path: Path) -> BrokenCheckpoint:
    return BrokenCheckpoint(f"{path} is missing", hint="download the checkpoint again")


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise BrokenCheckpoint(f"{path} is missing", hint="is this a model folder?") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise BrokenCheckpoint(
            f"{path} is not valid JSON ({error})", hint="download the file again"
        ) from None
    if not isinstance(value, dict):
        raise BrokenCheckpoint(f"{path} does not hold an object", hint="download the file again")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf8")
