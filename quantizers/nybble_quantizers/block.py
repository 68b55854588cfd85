"""One decoder block through AWQ: search a scale for every fold, then the range of every group, then round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nybble_models.decoder import Decoder
from nybble_models.families import Family
from nybble_models.formats.form import TENSOR, Form
from nybble_models.spec import ModelSpec
from nybble_models.weights import Block, Linear
from nybble_models.window import Window
from nybble_quantizers import awq, clipping, rtn
from nybble_quantizers.calibrate import Inputs
from nybble_quantizers.folding import float_weight, fold, foldable, pool, spread
from nybble_quantizers.rounding import Quantized, inputs_of, nearest
from nybble_quantizers.scheme import Scheme
from nybble_quantizers.workers import Map, in_turn

UNCLIPPED = ("q", "k")  # attention scores punish an error in one key more than a squared error tells
TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Scene:
    """Where a block stands: the layer, the decoder that runs it, what its linears read."""

    decoder: Decoder
    family: Family
    layer: int
    inputs: Inputs

    @property
    def spec(self) -> ModelSpec:
        return self.decoder.spec

    def half(self, block: Block, norm: str, rows: Iterable[Tensor]) -> Tensor:
        """What the attention or the feed-forward half adds to the stream, for inputs past its norm."""
        if norm == "attention_norm":
            parts = [self.decoder.attention(block, self.layer, x, Window(self.spec)) for x in rows]
        else:
            parts = [self.decoder.mlp(block, x) for x in rows]
        return torch.cat(parts)


@dataclass(frozen=True, slots=True)
class Finding:
    """What the search chose for one linear."""

    ratio: float | None = None
    duo: bool = False
    clip_share: float | None = None
    noise: float | None = None  # of the output, over its signal
    damp: float | None = None


@torch.inference_mode()
def round_block(
    block: Block, scene: Scene, forms: Mapping[str, Form], clip: bool, run: Map = in_turn
) -> tuple[Block, dict[str, Finding]]:
    """The block with linears in their `forms`; `clip`: the range of every group is searched."""
    quantized, findings = Block(dict(block.linears), block.norms), dict[str, Finding]()
    names = [p for p in reversed(scene.spec.projections) if p in forms]  # the largest first
    made = run(lambda name: _round(name, block.linears[name], scene, forms[name], clip), names)
    for name, (linear, finding) in zip(names, made, strict=True):
        quantized.linears[name], findings[name] = linear, finding
    return quantized, findings


def merged(scales: dict[str, Finding], rounding: dict[str, Finding]) -> dict[str, Finding]:
    """What the search for scales found, and how the rounding after it went."""
    made = dict(rounding)
    for name, found in scales.items():
        made[name] = replace(rounding.get(name, Finding()), ratio=found.ratio, duo=found.duo)
    return made


@torch.inference_mode()
def fold_block(
    block: Block, scene: Scene, scheme: Scheme, forms: Mapping[str, Form], run: Map = in_turn
) -> tuple[Block, dict[str, Finding]]:
    """The same function with the scales that make rounding cost least. Rescales the scene's inputs."""
    findings: dict[str, Finding] = {}
    for producer, consumers in scene.family.folds:
        if foldable(scene.spec, producer, consumers) and forms.keys() >= set(consumers):
            choice = _search(block, scene, forms, scheme.grid, producer, consumers, run)
            block = fold(block, scene.spec, producer, consumers, choice.scale)
            rescale(scene.inputs, consumers[0], spread(scene.spec, producer, choice.scale))
            findings |= dict.fromkeys(consumers, Finding(choice.ratio, choice.duo))
    return block, findings


def _search(
    block: Block,
    scene: Scene,
    forms: Mapping[str, Form],
    grid: int,
    producer: str,
    consumers: tuple[str, ...],
    run: Map,
) -> awq.Choice:
    weights = [float_weight(block.linears[c]) for c in consumers]
    seen, spec = scene.inputs, scene.spec
    read = consumers[0]
    target = scene.half(block, producer, seen.rows[read]) if producer in block.norms else None
    signal = awq.energy(weights[0], seen.gram[read]) if target is None else float(target.square().sum())

    def loss(scale: Tensor) -> float:
        columns = spread(spec, producer, scale)
        tried = [awq.scaled_rounding(w, columns, forms[c]) for c, w in zip(consumers, weights, strict=True)]
        if target is None:
            return awq.energy(tried[0].sub_(weights[0]), seen.gram[read]) / max(signal, TINY)
        linears = {c: replace(block.linears[c], weight=w) for c, w in zip(consumers, tried, strict=True)}
        output = scene.half(Block(block.linears | linears, block.norms), producer, seen.rows[read])
        return float(output.sub_(target).square_().sum()) / max(signal, TINY)

    group = forms[read].group(weights[0].shape[1])
    activation, magnitude = seen.mean[read], awq.magnitude(weights, group)
    activation, magnitude = pool(spec, producer, activation), pool(spec, producer, magnitude)
    return awq.search(loss, activation, magnitude, grid, run)


def rescale(inputs: Inputs, read: str, columns: Tensor) -> None:
    """The same tokens, seen through the folded producer."""
    inputs.mean[read] = inputs.mean[read] / columns
    inputs.peak[read] = inputs.peak[read] / columns
    inputs.gram[read] = inputs.gram[read] / (columns * columns[:, None])
    inputs.rows[read] = [x / columns for x in inputs.rows[read]]


def _round(name: str, linear: Linear, scene: Scene, form: Form, clip: bool) -> tuple[Linear, Finding]:
    weight, read = float_weight(linear), read_by(name, scene.spec)
    gram = scene.inputs.gram[read]
    inputs = inputs_of(form, float(scene.inputs.peak[read].max()))
    if clip and form.kind == "int" and form.group_size != TENSOR and name not in UNCLIPPED:
        group = form.group(weight.shape[1])
        found = clipping.search(weight, gram, form.bits, group, form.symmetric, clip)
        share = found.share
        made: Quantized = rtn.on_grid(weight, found.levels, group, form.symmetric)
    else:
        share, made = 0.0, nearest(weight, form)
    noise = awq.energy(made.dequantize() - weight, gram) / max(awq.energy(weight, gram), TINY)
    return replace(linear, weight=made, inputs=inputs), Finding(clip_share=share, noise=noise)


def read_by(name: str, spec: ModelSpec) -> str:
    """The name under which the decoder shows this linear's input."""
    if name in ("q", "k", "v"):
        return "q"
    return spec.mlp[0] if name in ("gate", "up") else name
