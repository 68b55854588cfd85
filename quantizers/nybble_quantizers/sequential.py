"""A block through GPTQ while the text passes it: what a linear reads is made by linears rounded before it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
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
from nybble_quantizers.gptq import Factor, factorise, round_all
from nybble_quantizers.hessian import hessian, lack
from nybble_quantizers.rounding import Quantized, inputs_of
from nybble_quantizers.scheme import Scheme
from nybble_quantizers.windows import Place, Seen, Windows, in_memory
from nybble_quantizers.workers import Map, in_turn

log = logging.getLogger("nybble.quantize")

SHARE = 0.5  # of what a linear's output lacks, added to what its weights aim at
ENOUGH = 10
"""Tokens for each input of a linear: with fewer, what it seems to lack is the text's. SmolLM2-135M with 3 to
7 of them had a KL divergence of 0.084 with the correction and 0.074 without; with 10.7 of them for
down it had 0.108 with down corrected and 0.112 without (single runs by hand)."""

Lacking = Callable[[Tensor, Tensor], Tensor]
"""`lacking(weight [N, K], XᵀX [K, K])` -> Σ (what the output should be - what it is)ᵀ x̂ [N, K]."""


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
        place: Place = in_memory,
    ) -> None:
        self.decoder = decoder
        self.layer = layer
        self.block = block
        self.scheme = scheme
        self.forms = forms
        self.run = run
        self.place = place
        self.made = Block(dict(block.linears), block.norms)
        self.dense = Block(dict(block.linears), block.norms)
        self.findings: dict[str, Finding] = {}

    def through(self, states: Windows, plain: Windows) -> None:
        """Round q, k and v, then o, then gate and up, then down; move the text on.

        states: [T, D] a window, as the rounded model makes them · plain: as the float model does, or no
        windows. Both then hold what comes after the block. What the last linear of a half reads is kept until
        that linear is rounded, so the text passes once.
        """
        self._half("attention_norm", ("q", "k", "v"), "o", self._mixed, states, plain)
        self._half("mlp_norm", self.decoder.spec.mlp[:-1], "down", self._inner, states, plain)

    def _half(
        self,
        norm: str,
        readers: tuple[str, ...],
        last: str,
        between: Callable[[Block, Tensor], Tensor],
        states: Windows,
        plain: Windows,
    ) -> None:
        """Linears that read the norm aim at what the float ones make of their own input; the last one at
        the float model's state, so that it makes up for what the stream lacks already."""
        weights, ending, spec = self.dense.norms[norm], self.block.linears[last], self.decoder.spec
        normed = Seen(states, lambda x: self.decoder.norm(weights, x))
        told = Seen(plain, lambda x: self.decoder.norm(weights, x))
        if self.forms.keys() & set(readers):
            read, inputs = self._read(readers, normed)
            known = enough(plain, spec.hidden_size)
            lacking = _by_input(lack(told, read, read, self.run)) if known else None
            self._round(readers, read, inputs, lacking)
        held = self.place(len(states), (len(states[0]), spec.shape(last)[1]))
        self._fill(held, lambda i: between(self.dense, normed[i]))
        self._add(plain, lambda i: reference.linear(between(self.block, told[i]), ending.weight))
        made_of: Sequence[Tensor] = held
        if last in self.forms:
            made_of, inputs = self._read((last,), held)
            known = enough(plain, spec.shape(last)[1])
            # without the bias, which stays what it is
            lacking = _by_output(lack(plain, states, made_of, self.run)) if known else None
            self._round((last,), made_of, inputs, lacking)
        made = self.dense.linears[last]
        self._add(states, lambda i: reference.linear(made_of[i], made.weight, made.bias))
        if ending.bias is not None:
            bias = ending.bias
            self._add(plain, lambda i: bias)

    def _read(
        self, names: tuple[str, ...], held: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Activations | None]:
        """What the linears of one input read of it: rounded, where their form says so."""
        form = next(self.forms[name] for name in names if name in self.forms)
        largest = max(self.run(_peak, held)) if form.inputs == "tensor" else 0.0
        inputs = inputs_of(form, largest)
        return (held, None) if inputs is None else (Seen(held, inputs.round), inputs)

    def _add(self, states: Windows, function: Callable[[int], Tensor]) -> None:
        self._fill(states, lambda i: states[i] + function(i))

    def _fill(self, windows: Windows, function: Callable[[int], Tensor]) -> None:
        def fill(index: int) -> None:
            windows[index] = function(index)

        self.run(fill, range(len(windows)))

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
        read: Sequence[Tensor],
        inputs: Activations | None,
        lacking: Lacking | None,
    ) -> None:
        """The linears of one input: they share its Hessian, and, as engines fuse them, their form."""
        wanted = [name for name in names if name in self.forms]
        form, gram = self.forms[wanted[0]], hessian(read, self.run)
        factor = factorise(gram, form.group(len(gram)), self.scheme.order, self.scheme.damp)
        if factor.damp > self.scheme.damp:
            log.warning("layer %d, input of %s: damping raised to %g", self.layer, wanted[0], factor.damp)
        weights = [float_weight(self.dense.linears[name]) for name in wanted]
        aims = weights
        if lacking is not None:
            aims = [w + SHARE * factor.solve(lacking(w, gram)) for w in weights]
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


def _by_input(gap: Tensor) -> Lacking:
    """What a float input makes more than the one that is read: gap is Σ (x - x̂)ᵀ x̂ [K, K]."""
    return lambda weight, gram: weight @ gap


def _by_output(wanted: Tensor) -> Lacking:
    """What the stream lacks without this linear, Σ (y - ŷ)ᵀ x̂ [N, K], less what the linear makes of x̂."""
    return lambda weight, gram: wanted - weight @ gram


def enough(plain: Windows, inputs: int) -> bool:
    """Whether the float model's states are enough to tell a linear what it lacks."""
    return len(plain) > 0 and len(plain) * len(plain[0]) >= ENOUGH * inputs


def _without(block: Block, name: str) -> Block:
    """The block with a linear that makes no outputs, where only what it reads is wanted."""
    nothing = Linear(float_weight(block.linears[name])[:0])
    return Block(block.linears | {name: nothing}, block.norms)


def _peak(x: Tensor) -> float:
    return float(x.abs().max())
