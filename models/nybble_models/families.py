"""Model families as rows of data: which config fields mean what, and what each tensor is called on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from nybble_models.errors import UnsupportedModel
from nybble_models.spec import Activation, ModelSpec, RotaryScaling

Config = Mapping[str, Any]


_LLAMA_NORMS = {
    "attention_norm": "model.layers.{i}.input_layernorm",
    "mlp_norm": "model.layers.{i}.post_attention_layernorm",
}
_QWEN3_NORMS = _LLAMA_NORMS | {
    "q_norm": "model.layers.{i}.self_attn.q_norm",
    "k_norm": "model.layers.{i}.self_attn.k_norm",
}
_LLAMA_PROJECTIONS = {p: f"model.layers.{{i}}.self_attn.{p}_proj" for p in "qkvo"} | {
    p: f"model.layers.{{i}}.mlp.{p}_proj" for p in ("gate", "up", "down")
}
_OPT_NORMS = {
    "attention_norm": "model.decoder.layers.{i}.self_attn_layer_norm",
    "mlp_norm": "model.decoder.layers.{i}.final_layer_norm",
}
_OPT_PROJECTIONS = {
    "q": "model.decoder.layers.{i}.self_attn.q_proj",
    "k": "model.decoder.layers.{i}.self_attn.k_proj",
    "v": "model.decoder.layers.{i}.self_attn.v_proj",
    "o": "model.decoder.layers.{i}.self_attn.out_proj",
    "up": "model.decoder.layers.{i}.fc1",
    "down": "model.decoder.layers.{i}.fc2",
}


@dataclass(frozen=True)
class Family:
    """One row. Names hold `{i}` where the layer number goes; they leave off `.weight` and `.bias`.

    `facts` turns a Hugging Face config into the spec fields in which families differ.
    `folds` are the pairs AWQ and SmoothQuant may move a scale across: producer -> the linears it feeds.
    """

    name: str
    architectures: tuple[str, ...]
    facts: Callable[[Config], dict[str, Any]]
    embed: str = "model.embed_tokens"
    positions: str | None = None
    final_norm: str = "model.norm"
    head: str = "lm_head"
    norms: Mapping[str, str] = field(default_factory=_LLAMA_NORMS.copy)
    projections: Mapping[str, str] = field(default_factory=_LLAMA_PROJECTIONS.copy)
    folds: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("attention_norm", ("q", "k", "v")),
        ("v", ("o",)),
        ("mlp_norm", ("gate", "up")),
        ("up", ("down",)),
    )


def _llama(config: Config) -> dict[str, Any]:
    biased = bool(config.get("attention_bias", False))
    return _rotary(config) | {
        "qkv_bias": biased,
        "o_bias": biased,
        "mlp_bias": bool(config.get("mlp_bias", False)),
    }


def _mistral(config: Config) -> dict[str, Any]:
    window = config.get("sliding_window")
    return _rotary(config) | {"windows": (window,) * config["num_hidden_layers"] if window else ()}


def _qwen2(config: Config) -> dict[str, Any]:
    return _rotary(config) | {"qkv_bias": True, "windows": _qwen_windows(config)}


def _qwen3(config: Config) -> dict[str, Any]:
    biased = bool(config.get("attention_bias", False))
    return _rotary(config) | {
        "qkv_bias": biased,
        "o_bias": biased,
        "qk_norm": True,
        "windows": _qwen_windows(config),
    }


def _qwen_windows(config: Config) -> tuple[int | None, ...]:
    """Qwen windows only the layers from `max_window_layers` on, and only when `use_sliding_window` is set."""
    layers, window = config["num_hidden_layers"], config.get("sliding_window")
    if not config.get("use_sliding_window") or not window:
        return ()
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", layers)
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _opt(config: Config) -> dict[str, Any]:
    hidden = config["hidden_size"]
    if not config.get("do_layer_norm_before", True) or config.get("word_embed_proj_dim", hidden) != hidden:
        raise UnsupportedModel(
            "this OPT checkpoint (the 350M layout) normalises after each block and projects its embeddings",
            hint="use another OPT size: 125M, 1.3B, 2.7B, 6.7B, 13B, 30B and 66B are supported",
        )
    biased = bool(config.get("enable_bias", True))
    return {
        "intermediate_size": config["ffn_dim"],
        "norm": "layer",
        "norm_eps": 1e-5,
        "activation": _activation(config.get("activation_function", "relu")),
        "gated": False,
        "positions": "learned",
        "position_offset": 2,
        "qkv_bias": biased,
        "o_bias": biased,
        "mlp_bias": biased,
        "tied_head": bool(config.get("tie_word_embeddings", True)),
    }


def _rotary(config: Config) -> dict[str, Any]:
    """The fields that Llama and its relatives share."""
    parameters: Config = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or parameters
    theta = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
    return {
        "intermediate_size": config["intermediate_size"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "activation": _activation(config.get("hidden_act", "silu")),
        "rotary_theta": float(theta),
        "rotary_scaling": _scaling(scaling, config),
        "tied_head": bool(config.get("tie_word_embeddings", False)),
    }


def _scaling(scaling: Mapping[str, Any], config: Config) -> RotaryScaling | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("default", None):
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise UnsupportedModel(
            f"rotary scaling {kind!r} is not supported", hint="linear, llama3 and yarn are"
        )
    trained = scaling.get("original_max_position_embeddings") or config.get("max_position_embeddings", 8192)
    return RotaryScaling(
        kind=kind,
        factor=float(scaling["factor"]),
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        original_positions=int(trained),
        beta_fast=float(scaling.get("beta_fast") or 32.0),
        beta_slow=float(scaling.get("beta_slow") or 1.0),
        attention_factor=scaling.get("attention_factor"),
    )


def _activation(name: str) -> Activation:
    name = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}.get(name, name)
    if name not in get_args(Activation):
        raise UnsupportedModel(
            f"activation {name!r} is not supported", hint=f"known: {', '.join(get_args(Activation))}"
        )
    return name  # type: ignore[return-value]


FAMILIES: tuple[Family, ...] = (
    Family("llama", ("LlamaForCausalLM",), _llama),
    Family("mistral", ("MistralForCausalLM",), _mistral),
    Family("qwen2", ("Qwen2ForCausalLM",), _qwen2),
    Family("qwen3", ("Qwen3ForCausalLM",), _qwen3, norms=_QWEN3_NORMS),
    Family(
        "opt",
        ("OPTForCausalLM",),
        _opt,
        embed="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        final_norm="model.decoder.final_layer_norm",
        norms=_OPT_NORMS,
        projections=_OPT_PROJECTIONS,
        folds=(
            ("attention_norm", ("q", "k", "v")),
            ("v", ("o",)),
            ("mlp_norm", ("up",)),
            ("up", ("down",)),
        ),
    ),
)


def family_of(config: Config) -> Family:
    """The row for a Hugging Face config, by its architecture. Raises `UnsupportedModel`."""
    found = config.get("architectures") or []
    for family in FAMILIES:
        if set(family.architectures) & set(found):
            return family
    known = ", ".join(a for f in FAMILIES for a in f.architectures)
    raise UnsupportedModel(f"architecture {found or 'missing'} is not supported", hint=f"supported: {known}")


def spec_of(config: Config) -> ModelSpec:
    """Read the facts from a Hugging Face config. Raises `UnsupportedModel` for what is not known here."""
    family = family_of(config)
    try:
        return ModelSpec(family=family.name, **(_sizes(config) | family.facts(config)))
    except KeyError as error:
        raise UnsupportedModel(
            f"config.json has no {error.args[0]!r}", hint="is the file complete?"
        ) from None


def _sizes(config: Config) -> dict[str, Any]:
    """The fields that every family spells alike."""
    heads = config["num_attention_heads"]
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "max_positions": config.get("max_position_embeddings", 2048),
    }
