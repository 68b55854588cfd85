"""Shapes of real models: what the benchmarks multiply. Facts from each model's published `config.json`."""

from __future__ import annotations

from nybble_models.spec import ModelSpec, RotaryScaling

_LLAMA_31 = RotaryScaling("llama3", 8.0, 1.0, 4.0, 8192)


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> ModelSpec:
    return ModelSpec("llama", 32000, hidden, inner, layers, heads, kv_heads, 128, 4096)


def _opt(hidden: int, layers: int, heads: int) -> ModelSpec:
    return ModelSpec(
        "opt",
        50272,
        hidden,
        4 * hidden,
        layers,
        heads,
        heads,
        128,
        2048,
        norm="layer",
        activation="relu",
        gated=False,
        positions="learned",
        position_offset=2,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tied_head=True,
    )


MODELS: dict[str, ModelSpec] = {
    "Llama-2-7B": _llama(4096, 11008, 32, 32, 32),
    "Llama-2-13B": _llama(5120, 13824, 40, 40, 40),
    "Llama-2-70B": _llama(8192, 28672, 80, 64, 8),
    "Llama-3.1-8B": ModelSpec(
        "llama",
        128256,
        4096,
        14336,
        32,
        32,
        8,
        128,
        131072,
        rotary_theta=5e5,
        rotary_scaling=_LLAMA_31,
    ),
    "OPT-6.7B": _opt(4096, 32, 32),
    "OPT-13B": _opt(5120, 40, 40),
    "Qwen2.5-7B": ModelSpec(
        "qwen2", 152064, 3584, 18944, 28, 28, 4, 128, 32768, norm_eps=1e-6, rotary_theta=1e6, qkv_bias=True
    ),
}

TINY = ModelSpec("llama", 256, 128, 128, 1, 2, 1, 64, 256)
"""For runs that only prove that everything runs."""


def linears(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the matrices of a decode step; partners that read the same input are one."""

    def stacked(*names: str) -> tuple[int, int]:
        shapes = [spec.shape(name) for name in names]
        return sum(outputs for outputs, _ in shapes), shapes[0][1]

    first = {"gate_up": stacked("gate", "up")} if spec.gated else {"up": stacked("up")}
    head = {"head": (spec.vocab_size, spec.hidden_size)}
    return {"qkv": stacked("q", "k", "v"), "o": stacked("o"), **first, "down": stacked("down"), **head}


def kv_bytes(spec: ModelSpec, element: int = 2) -> int:
    """Keys and values of one position, all layers."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * element


def token_bytes(spec: ModelSpec, bits: float, context: int = 0) -> float:
    """Fewest bytes a token must read at batch 1: linears at `bits` a weight, a 16-bit head, 16-bit KV."""
    shapes = linears(spec)
    outputs, inputs = shapes.pop("head")
    weights = spec.num_layers * sum(n * k for n, k in shapes.values())
    return weights * bits / 8 + 2 * outputs * inputs + context * kv_bytes(spec)


BITS = {"W4A16": 4.25, "W8A8": 8.0, "fp16": 16.0}
"""Stored bits a weight; W4A16 has a 16-bit scale and a zero point of up to 16 bits to 128 codes."""
