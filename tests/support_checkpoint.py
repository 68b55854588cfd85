"""Tiny checkpoints on disk: what a loader, a server or a test of either starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nybble_kernels.quantized import QuantizedTensor
from nybble_models.families import FAMILIES
from nybble_models.formats.awq import AwqCodec
from nybble_models.weights import Norm
from support_engine import byte_tokenizer
from support_quantized import uniform
from support_tiny import CONFIGS, tiny_spec, tiny_weights

VOCABULARY = 264  # the byte tokenizer's 260 ids, and some room


def write_checkpoint(
    directory: Path, family: str = "llama", *, group_size: int | None = 32, **changes: Any
) -> Path:
    """A servable folder with a byte tokenizer; AWQ unless `group_size` is None. `changes` of the config."""
    row = next(f for f in FAMILIES if f.name == family)
    config = CONFIGS[family] | {"architectures": list(row.architectures), "vocab_size": VOCABULARY} | changes
    spec = tiny_spec(family, vocab_size=VOCABULARY, **changes)
    weights = tiny_weights(spec, group_size=group_size)
    codec = AwqCodec()
    stored: dict[str, torch.Tensor] = {f"{row.embed}.weight": weights.embed}
    if weights.positions is not None:
        stored[f"{row.positions}.weight"] = weights.positions
    if weights.head is not None and isinstance(weights.head.weight, torch.Tensor):
        stored[f"{row.head}.weight"] = weights.head.weight

    def put(name: str, norm: Norm) -> None:
        stored[f"{name}.weight"] = norm.weight
        if norm.bias is not None:
            stored[f"{name}.bias"] = norm.bias

    put(row.final_norm, weights.final_norm)
    for i, block in enumerate(weights.blocks):
        for role, norm in block.norms.items():
            put(row.norms[role].format(i=i), norm)
        for projection, linear in block.linears.items():
            name = row.projections[projection].format(i=i)
            if linear.bias is not None:
                stored[f"{name}.bias"] = linear.bias
            if isinstance(linear.weight, QuantizedTensor):
                stored |= {f"{name}.{part}": t for part, t in codec.encode(linear.weight).items()}
            else:
                stored[f"{name}.weight"] = linear.weight
    if group_size is not None:
        config |= {"quantization_config": codec.settings(uniform(4, group_size))}
    byte_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps(config | {"eos_token_id": 259}))
    save_file({n: t.contiguous() for n, t in stored.items()}, directory / "model.safetensors")
    return directory
