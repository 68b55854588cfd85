"""Which linears a scheme rounds, and how many bytes that will make."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nybble_models.errors import ModelError
from nybble_models.families import Family
from nybble_models.formats.codec import Codec
from nybble_models.spec import ModelSpec
from nybble_quantizers.scheme import Scheme

PARTNERS = (("q", "k", "v"), ("gate", "up"))  # engines fuse them, so all or none are quantized
SPARE = 16 << 20  # tokenizer, report, and the heads of files


@dataclass(frozen=True, slots=True)
class Selection:
    """`rounded[layer]` are the projections that the scheme wants and the format can hold."""

    rounded: tuple[frozenset[str], ...]
    skipped: tuple[str, ...]  # full names of the others, in order
    nbytes: int  # about what the folder will take


def select(spec: ModelSpec, family: Family, scheme: Scheme, codec: Codec) -> Selection:
    """Raises `ModelError` when a quantizing scheme would round nothing."""
    layers = range(spec.num_layers)
    rounded = tuple(_rounded(spec, family, scheme, codec, layer) for layer in layers)
    if scheme.method != "none" and not any(rounded):
        shape = spec.shape("q")
        reason = codec.fits(shape, scheme.bits, scheme.group(shape[1])) or "all of them are skipped"
        raise ModelError(f"no linear can be quantized: {reason}", hint="change the scheme")
    skipped = tuple(
        family.projections[p].format(i=layer)
        for layer in layers
        for p in spec.projections
        if p not in rounded[layer]
    )
    return Selection(rounded, skipped, _bytes(spec, scheme, rounded))


def _rounded(spec: ModelSpec, family: Family, scheme: Scheme, codec: Codec, layer: int) -> frozenset[str]:
    if scheme.method == "none":
        return frozenset()

    def fits(projection: str) -> bool:
        shape = spec.shape(projection)
        held = codec.fits(shape, scheme.bits, scheme.group(shape[1])) is None
        return held and not scheme.skips(family.projections[projection].format(i=layer))

    fit = {p for p in spec.projections if fits(p)}
    for partners in PARTNERS:
        present = {p for p in partners if p in spec.projections}
        if not present <= fit:
            fit -= present
    return frozenset(fit)


def _bytes(spec: ModelSpec, scheme: Scheme, rounded: tuple[frozenset[str], ...]) -> int:
    """Codes, a 16-bit scale and a zero a group; 16 bits for every other weight."""
    total = 2.0 * spec.parameters + SPARE
    for layer in rounded:
        for projection in layer:
            shape = spec.shape(projection)
            per_weight = scheme.bits / 8 + (2 + scheme.bits / 8) / scheme.group(shape[1])
            total += math.prod(shape) * (per_weight - 2)
    return int(total)
