"""What a model on disk is, from its config and the heads of its files: no tensor is read."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.errors import CheckpointError, UsageError
from nybble_models.families import Family, family_of, spec_of
from nybble_models.formats.overrides import summary
from nybble_models.spec import ModelSpec

KV_BYTES = 2  # bfloat16 or float16
LONGEST_HEAD = 100 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as it lies in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """`bytes` by kind: linear, embedding, head, norm. `bits` is the average over all of `parameters`."""

    path: str
    format: str
    family: str
    method: str
    parameters: int
    bits: float
    group_size: int | None
    symmetric: bool | None
    dtypes: dict[str, int]
    bytes: dict[str, int]
    layers: int
    max_model_len: int
    kv_bytes_per_token: int

    @property
    def plan(self) -> dict[str, int]:
        """Bytes needed to serve: the weights, and the KV cache of one request of full length."""
        return {"weights": sum(self.bytes.values()), "kv": self.kv_bytes_per_token * self.max_model_len}


def inspect_model(path: Path) -> Inspection:
    """A Hugging Face folder or a GGUF file. Raises what is wrong with it, by file and tensor."""
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder", hint="give a model folder or a .gguf file")
    if path.suffix == ".gguf":
        return _gguf(path)
    raise UsageError(f"{path}: not a model", hint="give a folder with config.json, or a .gguf file")


def _folder(path: Path) -> Inspection:
    from nybble_models.checkpoint import read_config

    config = read_config(path)
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(f"{path}: no .safetensors file", hint="other kinds of weights are not read")
    tensors = [tensor for shard in shards for tensor in safetensors_head(shard)]
    settings = config.get("quantization_config") or {}
    method = str(settings.get("quant_method", "none"))
    return _inspection(path, "safetensors", config, method, settings, tensors)


def _gguf(path: Path) -> Inspection:
    from nybble_models.formats.gguf import Gguf
    from nybble_models.formats.gguf_header import read_header

    head = read_header(path)
    tensors = [Stored(name, each.kind.name, each.shape, each.nbytes) for name, each in head.tensors.items()]
    config = Gguf(path).config
    method, settings = _gguf_rule(tensors, family_of(config))
    return _inspection(path, "gguf", config, method, settings, tensors)


def _gguf_rule(tensors: list[Stored], family: Family) -> tuple[str, dict[str, Any]]:
    """The method by the type that most weights of linears have, and its groups where they are known."""
    sizes = Counter[str]()
    for tensor in tensors:
        if len(tensor.shape) == 2 and kind_of(tensor.name, family) == "linear":
            sizes[tensor.dtype] += math.prod(tensor.shape)
    kind = sizes.most_common(1)[0][0] if sizes else "F32"
    if kind in ("F32", "F16", "BF16"):
        return "none", {}
    known = {"Q4_0": True, "Q4_1": False, "Q8_0": True}
    return f"gguf {kind}", {"group_size": 32, "sym": known[kind]} if kind in known else {}


def _inspection(
    path: Path,
    format: str,
    config: Mapping[str, Any],
    method: str,
    settings: Mapping[str, Any],
    tensors: list[Stored],
) -> Inspection:
    spec, family = spec_of(config), family_of(config)
    sizes, dtypes = Counter[str](), Counter[str]()
    for tensor in tensors:
        sizes[kind_of(tensor.name, family)] += tensor.nbytes
        dtypes[tensor.dtype] += 1
    rule = summary(settings)
    return Inspection(
        path=str(path),
        format=format,
        family=spec.family,
        method=method,
        parameters=spec.parameters,
        bits=8 * sum(sizes.values()) / spec.parameters,
        group_size=rule.group_size,
        symmetric=rule.symmetric,
        dtypes=dict(dtypes.most_common()),
        bytes=dict(sizes.most_common()),
        layers=spec.num_layers,
        max_model_len=spec.max_positions,
        kv_bytes_per_token=kv_bytes(spec),
    )


def kv_bytes(spec: ModelSpec) -> int:
    """Keys and values of one token in all layers, at 16 bits."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * KV_BYTES


def kind_of(name: str, family: Family) -> str:
    """linear, embedding, head or norm, by the names of the family or of GGUF."""
    stem = name.rpartition(".")[0]
    if "norm" in stem:
        return "norm"
    if stem in (family.embed, family.positions, "token_embd", "position_embd"):
        return "embedding"
    return "head" if stem in (family.head, "output") else "linear"


def safetensors_head(path: Path) -> Iterator[Stored]:
    """The tensors of one file. Raises `CheckpointError` for a file that is not whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else LONGEST_HEAD + 1
        if length > min(size, LONGEST_HEAD):
            raise CheckpointError(f"{path}: not a safetensors file", hint="download the file again")
        try:
            head = json.loads(file.read(length))
            found = [_stored(name, entry) for name, entry in head.items() if name != "__metadata__"]
            end = max(
                (entry["data_offsets"][1] for name, entry in head.items() if name != "__metadata__"),
                default=0,
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{path}: its head is damaged", hint="download the file again") from None
    if 8 + length + end != size:
        expected, hint = 8 + length + end, "download the file again"
        raise CheckpointError(f"{path}: {expected:,} bytes expected, {size:,} found", hint=hint)
    yield from found


def _stored(name: str, entry: Mapping[str, Any]) -> Stored:
    begin, end = entry["data_offsets"]
    shape = tuple(int(length) for length in entry["shape"])
    if end < begin or math.prod(shape) < 0:
        raise ValueError(name)
    return Stored(name, str(entry["dtype"]), shape, end - begin)
