"""A block through GPTQ while the text passes it: what a linear reads is made by linears rounded before it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from nybble_kernels import reference
from nybble_kernels.activations import Activations
from nybble_models.decoder import Decoder
from nybble_models.formats.form import Form
from nybble_models.weights import Block, Linear
from nybble_models.window import Window
from nybble_quantizers import awq, fp8
from nybble_quantizers.block import TINY, Finding
from nybble_quantizers.folding import float_weight
from nybble_quantizers.gptq import DAMP, Factor, factorise, round_all
from nybble_quantizers.hessian import hessian, lack
from nybble_quantizers.rounding import Quantized, inputs_of
from nybble_quantizers.scheme import Scheme
from nybble_quantizers.workers import Map, in_turn

log = logging.getLogger("nybble.quantize")

TOGETHER = 8  # windows computed before what they were made of is let go
SHARE = 0.5  # of what a linear's output lacks, added to what its weights aim at; all of it overfits


class Passage:
    """One block, and where the text stands in it.

    block: in float · made: the block with the linears rounded so far · dense: the same in float32, which the
    text passes · findings: what was chosen for each.
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
        self.block = block
        self.scheme = scheme
        self.forms = forms
        self.run = run
        self.made = Block(dict(block.linears), block.norms)
        self.dense = Block(dict(block.linears), block.norms)
        self.findings: dict[str, Finding] = {}

    def through(self, states: list[Tensor], plain: list[Tensor]) -> None:
        """Round q, k and v, then o, then gate and up, then down; move the text on.

        states: [T, D] a window, as the rounded model makes them · plain: as the float model does. Both lists
        then hold what comes after the block. What the last linear of a half reads is kept until that linear
        is rounded, so the text passes once.
        """
        self._half("attention_norm", ("q", "k", "v"), "o", self._mixed, states, plain)
        self._half("mlp_norm", self.decoder.spec.mlp[:-1], "down", self._inner, states, plain)

    def _half(
        self,
        norm: str,
        readers: tuple[str, ...],
        last: str,
        between: Callable[[Block, Tensor], Tensor],
        states: list[Tensor],
        plain: list[Tensor],
    ) -> None:
        """Linears that read the norm aim at what the float ones make of their own input; the last one at
        the float model's state, so that it makes up for what the stream lacks already."""
        weights, ending = self.dense.norms[norm], self.block.linears[last]
        held = self._each(lambda x: self.decoder.norm(weights, x), list(states))
        told = self._each(lambda x: self.decoder.norm(weights, x), list(plain))
        if self.forms.keys() & set(readers):
            read, inputs = self._read(readers, list(held))
            gap = lack(told, read, read, self.run)
            self._round(readers, read, inputs, lambda weight, gram: weight @ gap)
        self._each(lambda x: between(self.dense, x), held)
        self._add(plain, lambda i: reference.linear(between(self.block, told[i]), ending.weight))
        if last in self.forms:
            held, inputs = self._read((last,), held)
            wanted = lack(plain, states, held, self.run)  # without the bias, which stays what it is
            self._round((last,), held, inputs, lambda weight, gram: wanted - weight @ gram)
        made = self.dense.linears[last]
        self._add(states, lambda i: reference.linear(held[i], made.weight, made.bias))
        if ending.bias is not None:
            bias = ending.bias
            self._add(plain, lambda i: bias)

    def _read(self, names: tuple[str, ...], held: list[Tensor]) -> tuple[list[Tensor], Activations | None]:
        """What the linears of one input read of it: rounded, where their form says so."""
        form = next(self.forms[name] for name in names if name in self.forms)
        inputs = inputs_of(form, max(float(x.abs().max()) for x in held))
        return (held, None) if inputs is None else (self._each(inputs.round, held), inputs)

    def _add(self, states: list[Tensor], function: Callable[[int], Tensor]) -> None:
        def add(index: int) -> None:
            states[index] = states[index] + function(index)

        self.run(add, range(len(states)))

    def _each(self, function: Callable[[Tensor], Tensor], held: list[Tensor]) -> list[Tensor]:
        """Replace the windows by what a function makes of them, a few at a time."""
        for first in range(0, len(held), TOGETHER):
            part = slice(first, first + TOGETHER)
            held[part] = self.run(function, held[part])
        return held

    def _mixed(self, block: Block, x: Tensor) -> Tensor:
        seen: dict[str, Tensor] = {}
        cache = Window(self.decoder.spec)
        self.decoder.attention(_without(block, "o"), self.layer, x, cache, seen.__setitem__)
        return seen["o"]

    def _inner(self, block: Block, x: Tensor) -> Tensor:
        seen: dict[str, Tensor] = {}
        self.decoder.mlp(_without(block, "down"), x, seen.__setitem__)
        return seen["down"]

    def _round(
        self,
        names: tuple[str, ...],
        read: list[Tensor],
        inputs: Activations | None,
        lacking: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """The linears of one input: they share its Hessian, and, as engines fuse them, their form."""
        wanted = [name for name in names if name in self.forms]
        form = self.forms[wanted[0]]
        gram = hessian(read, self.run)
        factor = factorise(gram, form.group(len(gram)))
        if factor.damp > DAMP:
            log.warning("layer %d, input of %s: damping raised to %g", self.layer, wanted[0], factor.damp)
        weights = [float_weight(self.dense.linears[name]) for name in wanted]
        aims = [weight + SHARE * factor.solve(lacking(weight, gram)) for weight in weights]
        for name, weight, (rounded, share) in zip(
            wanted, weights, self._rounded(aims, factor, form), strict=True
        ):
            dense = rounded.dequantize()
            self.made.linears[name] = Linear(rounded, self.dense.linears[name].bias, inputs)
            self.dense.linears[name] = replace(self.made.linears[name], weight=dense)
            noise = awq.energy(dense - weight, gram) / max(awq.energy(weight, gram), TINY)
            self.findings[name] = Finding(clip_share=share, noise=noise, damp=factor.damp)

    def _rounded(
        self, aims: list[Tensor], factor: Factor, form: Form
    ) -> list[tuple[Quantized, float | None]]:
        """Weights in their form, and the share of groups whose range was narrowed."""
        if form.kind == "float":
            made = self.run(lambda aim: fp8.compensated(aim, factor, form.group_size), aims)
            return [(weight, None) for weight in made]
        done = round_all(aims, factor, form.bits, form.symmetric, self.scheme.clip, run=self.run)
        return [(rounded.weight, rounded.share) for rounded in done]


def _without(block: Block, name: str) -> Block:
    """The block with a linear that makes no outputs, where only what it reads is wanted."""
    nothing = Linear(float_weight(block.linears[name])[:0])
    return Block(block.linears | {name: nothing}, block.norms)
