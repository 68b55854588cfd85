"""`Contents`: what the tensors of a checkpoint are, each looked at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor
from nybble_models.checkpoint import Checkpoint
from nybble_models.errors import BrokenCheckpoint, ModelError
from nybble_models.families import Family
from nybble_models.formats.codec import Codec
from nybble_models.formats.config_groups import activations_of
from nybble_models.formats.overrides import for_linear
from nybble_models.loader import CODECS
from nybble_models.spec import ModelSpec

Shape = tuple[int, ...]
Settings = Mapping[str, Any]


class _Unreadable(Exception):
    """A file is missing or cut: the message names it, and is the same for all that it should hold."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A quantized linear; `nbytes` as a kernel reads it."""

    shape: Shape
    bits: int
    group_size: int
    nbytes: int


class Contents:
    """Quantized linears by name, shapes of `others` by full name, and a line for each thing that is wrong.

    `broken` names what is there and cannot be read; `nbytes`, of all tensors as stored, is None then.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.linears: dict[str, Stored] = {}
        self.others: dict[str, Shape] = {}
        self.broken: set[str] = set()
        self.problems: list[str] = []
        self._checkpoint = checkpoint
        self._settings = checkpoint.config.get("quantization_config") or {}
        self._bytes = 0
        self._read()

    @property
    def nbytes(self) -> int | None:
        return None if self.broken else self._bytes

    def shape(self, full: str) -> Shape | None:
        """Of a tensor; "….weight" of a quantized linear is what its parts stand for."""
        held = self.linears.get(full.removesuffix(".weight"))
        return self.others.get(full) if held is None else held.shape

    def _read(self) -> None:
        codecs = self._codecs()
        parts: set[str] = set()
        for name in self._quantized(codecs):
            try:
                settings = for_linear(self._settings, name)
                tensors, codec = self._tensors(name, codecs, settings)
                parts |= {f"{name}.{part}" for part in tensors}
                self._bytes += sum(tensor.nbytes for tensor in tensors.values())
                self.linears[name] = _stored(codec, tensors, settings)
            except _Unreadable as error:
                self._note(name, str(error))
            except Exception as error:  # damage can show as any error of a codec
                self._note(name, f"{name}: {error}")
        if codecs and not self.linears and not self.broken:
            self.problems.append(f"config.json says {codecs[0].method}, and no linear is stored that way")
        for full in self._checkpoint.names():
            if full not in parts and full.rpartition(".")[0] not in self.broken:
                self._look_at(full)

    def _codecs(self) -> tuple[Codec, ...]:
        if not isinstance(self._settings, dict):
            raise BrokenCheckpoint("config.json: quantization_config is not an object")
        method = self._settings.get("quant_method")
        if method is not None and method not in CODECS:
            self.problems.append(f"config.json: quantization method {method!r} is not one that nybble reads")
        return CODECS.get(str(method), ())

    def _quantized(self, codecs: tuple[Codec, ...]) -> Iterator[str]:
        """Each linear that has the first tensor of a codec."""
        firsts = {codec.names[0] for codec in codecs}
        named = (full.rpartition(".") for full in self._checkpoint.names())
        yield from dict.fromkeys(name for name, _, part in named if part in firsts)

    def _tensors(
        self, name: str, codecs: tuple[Codec, ...], settings: Settings
    ) -> tuple[dict[str, Tensor], Codec]:
        """What the linear is made of, with the codec that the loader would choose."""
        held = [codec for codec in codecs if f"{name}.{codec.names[0]}" in self._checkpoint]
        codec = next((codec for codec in held if codec.reads(settings)), None)
        if codec is None:
            raise BrokenCheckpoint(f"is stored as {held[0].method}, and config.json says otherwise")
        present = [part for part in (*codec.names, *codec.optional) if f"{name}.{part}" in self._checkpoint]
        for part in codec.names:
            if part not in present:
                raise BrokenCheckpoint(f"its {part} is missing")
        try:
            return {part: self._checkpoint.tensor(f"{name}.{part}") for part in present}, codec
        except ModelError as error:
            raise _Unreadable(str(error)) from None

    def _look_at(self, full: str) -> None:
        try:
            tensor = self._checkpoint.tensor(full)
        except ModelError as error:
            self._note(full.removesuffix(".weight"), str(error))
            return
        self.others[full] = tuple(tensor.shape)
        self._bytes += tensor.nbytes
        if tensor.is_floating_point():
            tensor = tensor.float() if tensor.element_size() == 1 else tensor  # FP8 has no operations
            if not bool(tensor.isfinite().all()):
                self.problems.append(f"{full} holds NaN or infinity")

    def _note(self, name: str, problem: str) -> None:
        self.broken.add(name)
        if problem not in self.problems:  # one line for all tensors of a shard that is missing
            self.problems.append(problem)


def _stored(codec: Codec, tensors: dict[str, Tensor], settings: Settings) -> Stored:
    """Raises `BrokenCheckpoint` for tensors that mean no finite weight, or lack a scale of inputs."""
    weight = codec.decode(tensors, settings)
    activations_of(settings, tensors)
    if not bool(weight.scales.isfinite().all()):
        raise BrokenCheckpoint("its scales hold NaN or infinity")
    bits = weight.bits if isinstance(weight, QuantizedTensor) else 8
    if isinstance(weight, QuantizedTensor):
        levels = [weight.codes] if weight.zeros is None else [weight.codes, weight.zeros]
        if any(int(held.max()) >= 2**bits for held in levels):
            raise BrokenCheckpoint(f"its codes or zeros are not {bits}-bit")
    elif not bool(weight.dequantize().isfinite().all()):
        raise BrokenCheckpoint("its values hold NaN")
    return Stored(weight.shape, bits, weight.group_size, weight.nbytes)


def expected(spec: ModelSpec, family: Family) -> dict[str, Shape]:
    """Shapes of the tensors that a model of this spec has, were none quantized."""
    table, hidden = (spec.vocab_size, spec.hidden_size), (spec.hidden_size,)
    found: dict[str, Shape] = {f"{family.embed}.weight": table, f"{family.final_norm}.weight": hidden}
    if family.positions is not None:
        found[f"{family.positions}.weight"] = (spec.max_positions + spec.position_offset, *hidden)
    if not spec.tied_head:
        found[f"{family.head}.weight"] = table
    for layer in range(spec.num_layers):
        for role, pattern in family.norms.items():
            size = (spec.head_dim,) if role in ("q_norm", "k_norm") else hidden
            found[f"{pattern.format(i=layer)}.weight"] = size
        for projection in spec.projections:
            name, shape = family.projections[projection].format(i=layer), spec.shape(projection)
            found[f"{name}.weight"] = shape
            if spec.has_bias(projection):
                found[f"{name}.bias"] = shape[:1]
    return found
