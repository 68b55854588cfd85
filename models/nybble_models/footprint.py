"""What the matrices of a model will be held as, from settings and the heads of files: no tensor is read."""

from __future__ import annotations

from collections.abc import Mapping

from gguf import GGMLQuantizationType as Kind

from nybble_models.formats.compressed_tensors import FloatQuantizedCodec
from nybble_models.formats.gguf import BLOCK, Gguf
from nybble_models.formats.overrides import for_linear, summary
from nybble_models.loader import Loader
from nybble_models.plan import FLOATS, Quantization

LEVELS: Mapping[Kind, Quantization] = {
    Kind.Q4_0: Quantization(4, BLOCK, 16 + 4),
    Kind.Q4_1: Quantization(4, BLOCK, 16 + 16),
    Kind.Q8_0: Quantization(8, BLOCK, 16 + 8),
}


def held_as(loader: Loader, name: str, *, widens: bool = False) -> Quantization:
    """One matrix by its Hugging Face name, without "weight"; kernels hold levels in 4 or 8 bits.

    8-bit floats are held in 16 where the device `widens` them, and everywhere if blocks of them share scales.
    """
    source = loader.source
    if isinstance(source, Gguf):
        return LEVELS.get(source.kind(f"{name}.weight"), FLOATS)
    codec = loader.codec_of(name)
    if codec is None:
        return FLOATS
    if isinstance(codec, FloatQuantizedCodec):
        blocks = for_linear(loader.settings, name)["weights"].get("strategy") == "block"
        return FLOATS if widens or blocks else Quantization(8, loader.spec.hidden_size, 32)
    rule = summary(loader.settings, name)
    bits = 4 if (rule.bits or 4) <= 4 else 8
    return Quantization(bits, rule.group_size or loader.spec.hidden_size, 16 + bits)


def linear_held_as(loader: Loader, layer: int, projection: str, *, widens: bool = False) -> Quantization:
    return held_as(loader, loader.family.projections[projection].format(i=layer), widens=widens)


def tables_held_as(
    loader: Loader, head_bits: int, *, widens: bool = False
) -> tuple[Quantization, Quantization]:
    """The head, which is rounded to `head_bits` unless it is stored as levels, and the embedding."""
    family = loader.family
    embedding = held_as(loader, family.embed, widens=widens)
    head = embedding if loader.spec.tied_head else held_as(loader, family.head, widens=widens)
    return (head if head.bits < 16 else Quantization(head_bits)), embedding
