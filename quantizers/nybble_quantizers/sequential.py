"""A block through GPTQ while the text passes it: what a linear reads is made by linears rounded before it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nybble_kernels import reference
from nybble_models.decoder import Decoder
from nybble_models.formats.form import Form
from nybble_models.weights import Block, Linear
from nybble_models.window import Window
from nybble_quantizers import awq
from nybble_quantizers.block import TINY, Finding
from nybble_quantizers.folding import float_weight
from nybble_quantizers.gptq import DAMP, Factor, Rounded, factorise, round_to
from nybble_quantizers.scheme import Scheme
from nybble_quantizers.workers import Map, in_turn

log = logging.getLogger("nybble.quantize")

TOGETHER = 8  # windows whose Hessians are held at the same time


class Passage:
    """One block, and where the text stands in it.

    made: the block with the linears rounded so far · dense: the same in float32, which the text passes
    · findings: what was chosen for each.
    """

    def __init__(
        self,
        decoder: Decoder,
        layer: int,
        block: Block,
        scheme: Scheme,
        forms: Mapping[str, Form],
        run: Map = in_turn,
    ) -> None:
        self.decoder = decoder
        self.layer = layer
        self.scheme = scheme
        self.forms = forms
        self.run = run
        self.made = Block(dict(block.linears), block.norms)
        self.dense = Block(dict(block.linears), block.norms)
        self.findings: dict[str, Finding] = {}

    def through(self, states: list[Tensor]) -> list[Tensor]:
        """Round q, k and v, then o, then gate and up, then down, and return the states [T, D] after them.

        One pass in all: what the last linear of a half reads is kept until that linear is rounded.
        """
        spec, decoder = self.decoder.spec, self.decoder
        normed = self.run(lambda x: decoder.norm(self.dense.norms["attention_norm"], x), states)
        self._round(("q", "k", "v"), normed)
        mixed = self.run(self._mixed, normed)
        states = self._last("o", mixed, states)
        normed = self.run(lambda x: decoder.norm(self.dense.norms["mlp_norm"], x), states)
        self._round(spec.mlp[:-1], normed)
        inner = self.run(self._inner, normed)
        return self._last("down", inner, states)

    def _mixed(self, x: Tensor) -> Tensor:
        seen: dict[str, Tensor] = {}
        cache = Window(self.decoder.spec)
        self.decoder.attention(self.dense, self.layer, x, cache, seen.__setitem__)
        return seen["o"]

    def _inner(self, x: Tensor) -> Tensor:
        seen: dict[str, Tensor] = {}
        self.decoder.mlp(self.dense, x, seen.__setitem__)
        return seen["down"]

    def _last(self, name: str, inputs: list[Tensor], states: list[Tensor]) -> list[Tensor]:
        """Round the linear that ends a half, and add what it makes to the stream."""
        self._round((name,), inputs)
        linear = self.dense.linears[name]
        pairs = zip(states, inputs, strict=True)
        return self.run(lambda pair: pair[0] + reference.linear(pair[1], linear.weight, linear.bias), pairs)

    def _round(self, names: tuple[str, ...], inputs: list[Tensor]) -> None:
        """The linears of one input: they share its Hessian."""
        wanted = [name for name in names if name in self.forms]
        if not wanted:
            return
        gram = hessian(inputs, self.run)
        factor = factorise(gram, self.forms[wanted[0]].group(len(gram)))
        if factor.damp > DAMP:
            log.warning("layer %d, input of %s: damping raised to %g", self.layer, wanted[0], factor.damp)
        weights = {name: float_weight(self.dense.linears[name]) for name in wanted}
        done = self.run(lambda name: self._one(weights[name], factor, self.forms[name]), wanted)
        for name, rounded in zip(wanted, done, strict=True):
            self._keep(name, weights[name], rounded, gram)

    def _one(self, weight: Tensor, factor: Factor, form: Form) -> Rounded:
        return round_to(weight, factor, form.bits, form.symmetric, self.scheme.clip)

    def _keep(self, name: str, weight: Tensor, rounded: Rounded, gram: Tensor) -> None:
        bias, dense = self.dense.linears[name].bias, rounded.weight.dequantize()
        self.made.linears[name] = Linear(rounded.weight, bias)
        self.dense.linears[name] = Linear(dense, bias)
        noise = awq.energy(dense - weight, gram) / max(awq.energy(weight, gram), TINY)
        self.findings[name] = Finding(clip_share=rounded.share, noise=noise, damp=rounded.damp)


def hessian(inputs: list[Tensor], run: Map = in_turn) -> Tensor:
    """XᵀX over all tokens [K, K], summed in the order of the windows."""
    total = torch.zeros(inputs[0].shape[1], inputs[0].shape[1])
    for first in range(0, len(inputs), TOGETHER):
        for part in run(lambda x: x.T @ x, inputs[first : first + TOGETHER]):
            total += part
    return total


def merged(scales: dict[str, Finding], rounding: dict[str, Finding]) -> dict[str, Finding]:
    """What the search for scales found, and how the rounding after it went."""
    made = dict(rounding)
    for name, found in scales.items():
        made[name] = replace(rounding.get(name, Finding()), ratio=found.ratio, duo=found.duo)
    return made
