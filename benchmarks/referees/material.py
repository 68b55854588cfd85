"""What the referees are given: a tiny random model and random texts."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 256


def make_model(folder: Path) -> Path:
    """A random llama in float16 whose widths suit the readers' kernels; its tokenizer has a word a token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.05,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.half().save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "w1", "eos_token": "w2", "unk_token": "w0", "pad_token": "w2"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def make_texts(path: Path) -> Path:
    """Random tokens: 8 windows of 64 to calibrate on, 2 of 48 to answer."""
    generator = torch.Generator().manual_seed(1)
    calibration = torch.randint(3, VOCABULARY, (8, 64), generator=generator)
    prompts = torch.randint(3, VOCABULARY, (2, 48), generator=generator)
    save_file({"calibration": calibration, "prompts": prompts}, path)
    return path
