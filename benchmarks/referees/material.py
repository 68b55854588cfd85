"""What the referees are given: tiny random models and random texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

VOCABULARY = 256
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = SIZES | {"intermediate_size": 256, "num_key_value_heads": 2, "initializer_range": 0.05}
CONFIGS: Mapping[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GATED),
    "qwen2": Qwen2Config(**GATED, tie_word_embeddings=True),
    "opt": OPTConfig(**SIZES, ffn_dim=256, word_embed_proj_dim=128, init_std=0.05, pad_token_id=2),
}
"""A head of its own and no bias; biases of q, k and v, and the embedding as head; biases everywhere."""


def make_model(folder: Path, family: str = "llama") -> Path:
    """Random, in float16, of widths that suit the readers' kernels; its tokenizer has a word a token."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.half().save_pretrained(folder)
    words = {f"w{i:03}": i for i in range(VOCABULARY)}  # no special one may begin another
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w000"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "w001", "eos_token": "w002", "unk_token": "w000", "pad_token": "w002"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def make_texts(path: Path) -> Path:
    """Random tokens: 8 windows of 64 to calibrate on, 2 of 48 to answer."""
    generator = torch.Generator().manual_seed(1)
    calibration = torch.randint(3, VOCABULARY, (8, 64), generator=generator)
    prompts = torch.randint(3, VOCABULARY, (2, 48), generator=generator)
    save_file({"calibration": calibration, "prompts": prompts}, path)
    return path
