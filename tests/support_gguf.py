"""GGUF files of tiny models, written with llama.cpp's own library and in its row order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from nybble_models.formats.gguf import NORMS, PROJECTIONS
from nybble_models.spec import ModelSpec
from nybble_models.weights import Weights

Array = np.ndarray[Any, Any]


def interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to the rows of q and k of the llama architecture."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def write_gguf(
    path: Path,
    architecture: str,
    spec: ModelSpec,
    weights: Weights,
    *,
    kind: Kind = Kind.F32,
    kinds: Mapping[str, Kind] | None = None,
    tokens: int = 0,
) -> Path:
    """Linears of the given kind, others by parts of their names, the rest float32; with `tokens` a byte-level
    tokenizer of that many."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_rope_freq_base(spec.rotary_theta)
    writer.add_bos_token_id(1)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([*(chr(33 + i) for i in range(tokens - 1)), "!!"])
        writer.add_token_merges(["! !"])
        writer.add_array("tokenizer.ggml.token_type", [1] * tokens)
    for name, values in stored(architecture, spec, weights).items():
        chosen = kind if values.ndim == 2 and name.startswith("blk") else Kind.F32
        chosen = next((k for part, k in (kinds or {}).items() if part in name), chosen)
        raw = any_q6_k(values) if chosen == Kind.Q6_K else gguf.quants.quantize(values, chosen)
        writer.add_tensor(name, raw, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def any_q6_k(values: Array) -> Array:
    """Rows of super-blocks of some values: gguf reads the type, and does not write it. 210 bytes for 256."""
    raw = np.random.default_rng(6).integers(0, 256, (len(values), values.shape[1] // 256, 210), np.uint8)
    raw[..., 208:] = np.array([2e-5], np.float16).view(np.uint8)
    return raw.reshape(len(values), -1)


def stored(architecture: str, spec: ModelSpec, weights: Weights) -> dict[str, Array]:
    """The tensors as llama.cpp names and orders them."""
    found = {"token_embd.weight": weights.embed, "output_norm.weight": weights.final_norm.weight}
    if weights.head is not None:
        assert isinstance(weights.head.weight, torch.Tensor)
        found["output.weight"] = weights.head.weight
    for i, block in enumerate(weights.blocks):
        for role, norm in block.norms.items():
            found[f"blk.{i}.{NORMS[role]}.weight"] = norm.weight
        for projection, linear in block.linears.items():
            heads = {"q": spec.num_heads, "k": spec.num_kv_heads}.get(projection)
            for part, tensor in (("weight", linear.weight), ("bias", linear.bias)):
                if isinstance(tensor, torch.Tensor):
                    turned = heads is not None and architecture == "llama"
                    rows = interleaved(tensor, heads) if turned and heads else tensor
                    found[f"blk.{i}.{PROJECTIONS[projection]}.{part}"] = rows
    return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in found.items()}
