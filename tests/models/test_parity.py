"""The reference decoder against `transformers`, on tiny random models of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nybble_models.checkpoint import Checkpoint
from nybble_models.decoder import Decoder, ReferenceCache
from nybble_models.errors import UnsupportedModel
from nybble_models.families import spec_of
from nybble_models.loader import Loader

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
OPT_SIZES = {
    "vocab_size": 97, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "word_embed_proj_dim": 32,
}  # fmt: skip

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("LlamaConfig", SIZES),
    "llama-multi-head": ("LlamaConfig", SIZES | {"num_key_value_heads": 4}),
    "llama-biased-tied": (
        "LlamaConfig",
        SIZES | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-3": ("LlamaConfig", SIZES | {"rope_scaling": LLAMA3, "head_dim": 16}),
    "llama-yarn": ("LlamaConfig", SIZES | {"rope_scaling": YARN}),
    "llama-linear": ("LlamaConfig", SIZES | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "mistral": ("MistralConfig", SIZES | {"sliding_window": None}),
    "mistral-window": ("MistralConfig", SIZES | {"sliding_window": 5, "head_dim": 16}),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen2-window": (
        "Qwen2Config",
        SIZES | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", SIZES | {"head_dim": 16}),
    "opt": ("OPTConfig", OPT_SIZES),
    "opt-gelu-untied": (
        "OPTConfig",
        OPT_SIZES | {"activation_function": "gelu", "tie_word_embeddings": False},
    ),
}


@pytest.fixture(params=MODELS)
def model_and_decoder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Decoder]:
    """A saved model with every parameter away from its initial value, and our decoder over the same files."""
    name, settings = MODELS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    loader = Loader(Checkpoint(tmp_path))
    return model, Decoder(loader.spec, loader.load())


@torch.no_grad()
def test_logits_match_transformers(model_and_decoder: tuple[Any, Decoder]) -> None:
    model, decoder = model_and_decoder
    tokens = torch.randint(0, 97, (60,))
    expected = model(tokens[None]).logits[0]
    assert expected.std() > 0.1
    assert (decoder.forward(tokens) - expected).abs().max() < 1e-4


@torch.no_grad()
def test_cached_steps_match_one_pass(model_and_decoder: tuple[Any, Decoder]) -> None:
    _, decoder = model_and_decoder
    tokens = torch.randint(0, 97, (40,))
    cache = ReferenceCache(decoder.spec)
    parts = [decoder.forward(part, cache) for part in tokens.split([13, 1, 1, 25])]
    assert (torch.cat(parts) - decoder.forward(tokens)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"architectures": []}, "missing"),
        (OPT_SIZES | {"architectures": ["OPTForCausalLM"], "do_layer_norm_before": False}, "350M"),
        (SIZES | {"architectures": ["LlamaForCausalLM"], "hidden_act": "mish"}, "mish"),
        (
            SIZES | {"architectures": ["LlamaForCausalLM"], "rope_scaling": {"rope_type": "longrope"}},
            "longrope",
        ),
        ({"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4}, "vocab_size"),
    ],
    ids=["family", "no-architecture", "opt-350m", "activation", "rotary-scaling", "missing-field"],
)
def test_what_is_not_supported_is_named(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModel, match=says):
        spec_of(config)
