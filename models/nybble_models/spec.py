"""`ModelSpec`: what a decoder-only model is made of, as facts. Everything else reads this one description."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Norm = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Positions = Literal["rotary", "learned"]

ATTENTION = ("q", "k", "v", "o")


@dataclass(frozen=True, slots=True)
class RotaryScaling:
    """How rotary frequencies are stretched beyond the trained length.

    linear: all by `factor` (Chen et al. 2023) · llama3: low frequencies by `factor`, smooth in between
    (Llama 3.1) · yarn: NTK by parts with an attention temperature (Peng et al. 2023).
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A stack of identical pre-norm decoder blocks.

    `x + o(attention(q, k, v of norm(x)))`, then `x + down(act(gate) * up)` or, ungated, `x + down(act(up))`.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm: Norm = "rms"
    norm_eps: float = 1e-5
    activation: Activation = "silu"
    gated: bool = True
    positions: Positions = "rotary"
    position_offset: int = 0  # rows skipped at the start of a learned position table
    rotary_theta: float = 10000.0
    rotary_scaling: RotaryScaling | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()  # sliding window of each layer; empty means none anywhere
    tied_head: bool = False

    @property
    def attention_scale(self) -> float:
        return 1.0 / math.sqrt(self.head_dim)

    @property
    def mlp(self) -> tuple[str, ...]:
        return ("gate", "up", "down") if self.gated else ("up", "down")

    @property
    def projections(self) -> tuple[str, ...]:
        """The linears of one block, in the order they run."""
        return (*ATTENTION, *self.mlp)

    def shape(self, projection: str) -> tuple[int, int]:
        """(outputs, inputs) of a projection."""
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        outputs = {"q": query, "k": key, "v": key, "o": self.hidden_size, "down": self.hidden_size}
        inputs = {"o": query, "down": self.intermediate_size}
        return outputs.get(projection, self.intermediate_size), inputs.get(projection, self.hidden_size)

    def has_bias(self, projection: str) -> bool:
        if projection in ("q", "k", "v"):
            return self.qkv_bias
        return self.o_bias if projection == "o" else self.mlp_bias

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    @property
    def parameters(self) -> int:
        """Weights of the matrices: embeddings, projections, and the head unless tied."""
        block = sum(math.prod(self.shape(p)) for p in self.projections)
        head = 0 if self.tied_head else self.vocab_size * self.hidden_size
        learned = self.max_positions * self.hidden_size if self.positions == "learned" else 0
        return self.num_layers * block + self.vocab_size * self.hidden_size + head + learned

    @property
    def vectors(self) -> int:
        """Numbers of norms and biases."""
        norm = self.hidden_size * (2 if self.norm == "layer" else 1)
        biases = sum(self.shape(p)[0] for p in self.projections if self.has_bias(p))
        block = 2 * norm + (2 * self.head_dim if self.qk_norm else 0) + biases
        return self.num_layers * block + norm
