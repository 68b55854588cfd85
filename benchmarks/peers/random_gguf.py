"""Llama-3.2-1B's shapes with random 4-bit weights as a GGUF file: what decoding costs when no cache helps.

The tokenizer is another file's, filled up to the vocabulary with words that no text holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    theta: float = 500000.0
    epsilon: float = 1e-5
    context: int = 8192

    def linears(self) -> dict[str, tuple[int, int]]:
        """[outputs, inputs] of a block's, by llama.cpp's names."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = {"attn_q": (wide, self.hidden), "attn_k": (narrow, self.hidden)}
        attention |= {"attn_v": (narrow, self.hidden), "attn_output": (self.hidden, wide)}
        return attention | {
            "ffn_gate": (self.inner, self.hidden),
            "ffn_up": (self.inner, self.hidden),
            "ffn_down": (self.hidden, self.inner),
        }


SHAPES = {"llama-3.2-1b": Shape(16, 2048, 8192, 32, 8, 64, 128256)}


def q4_1(draw: np.random.Generator, outputs: int, inputs: int) -> Bytes:
    """Rows of blocks of 32: fp16 scale, fp16 minimum, 16 bytes of nibbles; w = scale q + minimum.

    Uniform levels with minimum = -7.5 scale have mean 0; the scale gives them a variance of 1 / inputs.
    """
    blocks = draw.integers(0, 256, (outputs, inputs // 32, 20), np.uint8)
    scale = np.float16((inputs * (16**2 - 1) / 12) ** -0.5)
    blocks[..., :4] = np.array([scale, -7.5 * scale], np.float16).view(np.uint8)
    return blocks.reshape(outputs, -1)


def q8_0(draw: np.random.Generator, outputs: int, inputs: int) -> Bytes:
    """Rows of blocks of 32: fp16 scale, 32 signed bytes; w = scale q, of a variance of 1 / inputs."""
    blocks = draw.integers(0, 256, (outputs, inputs // 32, 34), np.uint8)
    blocks[..., :2] = np.array([(inputs * 256**2 / 12) ** -0.5], np.float16).view(np.uint8)
    return blocks.reshape(outputs, -1)


def write(path: Path, shape: Shape, tokenizer: Path) -> None:
    """Linears as Q4_1, the embedding, which is the head too, as Q8_0; norms of ones."""
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    describe(writer, shape)
    copy_tokenizer(writer, gguf.GGUFReader(str(tokenizer)), shape.vocabulary)
    ones = np.ones(shape.hidden, np.float32)
    writer.add_tensor("token_embd.weight", q8_0(draw, shape.vocabulary, shape.hidden), raw_dtype=Kind.Q8_0)
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(shape.layers):
        for name, (outputs, inputs) in shape.linears().items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", q4_1(draw, outputs, inputs), raw_dtype=Kind.Q4_1)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_rope_freq_base(shape.theta)
    writer.add_vocab_size(shape.vocabulary)


def copy_tokenizer(writer: gguf.GGUFWriter, source: gguf.GGUFReader, vocabulary: int) -> None:
    def stored(name: str) -> Any:
        return source.fields[f"tokenizer.ggml.{name}"].contents()

    tokens, types = stored("tokens")[:vocabulary], stored("token_type")[:vocabulary]
    missing = range(len(tokens), vocabulary)
    writer.add_tokenizer_model(stored("model"))
    writer.add_tokenizer_pre(stored("pre"))
    writer.add_token_list([*tokens, *(f"<filler {i}>" for i in missing)])
    writer.add_token_types([*types, *(gguf.TokenType.NORMAL for _ in missing)])
    writer.add_token_merges(stored("merges"))
    for name in ("bos_token_id", "eos_token_id"):
        if f"tokenizer.ggml.{name}" in source.fields:
            writer.add_uint32(f"tokenizer.ggml.{name}", stored(name))
    writer.add_add_bos_token(False)
