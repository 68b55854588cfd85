"""Stream a checkpoint into `Weights`: tensors by the family's names, quantized ones through their codec."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor, Table, dense, shape_of
from nybble_models.errors import BrokenCheckpoint, UnsupportedModel
from nybble_models.families import Family, family_of, spec_of
from nybble_models.formats import awq, compressed_tensors, gptq
from nybble_models.formats.codec import Codec
from nybble_models.formats.config_groups import activations_of
from nybble_models.formats.overrides import for_linear
from nybble_models.spec import ModelSpec
from nybble_models.weights import Block, Linear, Norm, Weights

CPU = torch.device("cpu")

CODECS: dict[str, tuple[Codec, ...]] = {
    "awq": (awq.AwqCodec(),),
    "gptq": (gptq.GptqCodec(),),
    "compressed-tensors": (
        compressed_tensors.PackQuantizedCodec(),
        compressed_tensors.IntQuantizedCodec(),
        compressed_tensors.FloatQuantizedCodec(),
    ),
}
"""By `quant_method`; of several, a linear is read by the first that reads its settings and first tensor."""


class Source(Protocol):
    """Where tensors come from: a Hugging Face folder (`Checkpoint`) or a GGUF file (`Gguf`)."""

    @property
    def config(self) -> Mapping[str, Any]:
        """In Hugging Face's terms, whatever the file says."""
        ...

    def __contains__(self, name: str) -> bool: ...

    def tensor(self, name: str) -> Tensor:
        """A float or integer tensor by its Hugging Face name. Raises `BrokenCheckpoint`."""
        ...

    def levels(self, name: str) -> QuantizedTensor | None:
        """A matrix as exact levels, where the file holds it as such under this one name."""
        ...

    def release(self) -> None:
        """Let go of pages of the files that were read: they count as memory of the process until then."""
        ...

    def files(self) -> list[Path]:
        """Where all of it lies, what names the model first. A file need not be there."""
        ...


class Loader:
    """Reads one model part by part, so that a quantizer never holds more than a block.

    With `floats` every weight is a float matrix, whatever it is stored as: what is to be quantized anew.
    Files are read and decoded on the CPU; what is returned lies on `device`.
    """

    def __init__(self, source: Source, *, floats: bool = False, device: torch.device = CPU) -> None:
        self.source = source
        self.floats = floats
        self.device = device
        self.spec: ModelSpec = spec_of(source.config)
        self.family: Family = family_of(source.config)
        self.settings: Mapping[str, Any] = source.config.get("quantization_config") or {}
        self.codecs = self._codecs()

    @property
    def codec(self) -> Codec | None:
        """None where the checkpoint is not quantized."""
        return self.codecs[0] if self.codecs else None

    def _codecs(self) -> tuple[Codec, ...]:
        method = self.settings.get("quant_method")
        if method is None:
            return ()
        if method not in CODECS:
            raise UnsupportedModel(
                f"quantization method {method!r} is not supported", hint=f"supported: {', '.join(CODECS)}"
            )
        return CODECS[method]

    def codec_of(self, name: str) -> Codec | None:
        """What reads this linear; None where it is one tensor."""
        held = [c for c in self.codecs if f"{name}.{c.names[0]}" in self.source]
        settings = for_linear(self.settings, name) if held else {}
        return next((c for c in held if c.reads(settings)), None)

    def embed(self) -> Table:
        name, shape = self.family.embed, (self.spec.vocab_size, self.spec.hidden_size)
        codec = self.codec_of(name)
        if codec is None:
            return self._stored(f"{name}.weight", shape)
        weight = self._decoded(name, codec).weight
        _check(name, shape_of(weight), shape)
        return weight if isinstance(weight, QuantizedTensor) and not self.floats else dense(weight)

    def positions(self) -> Tensor | None:
        if self.family.positions is None:
            return None
        rows = self.spec.max_positions + self.spec.position_offset
        return self._shaped(f"{self.family.positions}.weight", (rows, self.spec.hidden_size))

    def block(self, layer: int) -> Block:
        """One decoder block, linears still apart (q, k, v)."""
        linears = {
            p: self._linear(
                self.family.projections[p].format(i=layer), self.spec.shape(p), self.spec.has_bias(p)
            )
            for p in self.spec.projections
        }
        norms = {role: self._norm(name.format(i=layer)) for role, name in self.family.norms.items()}
        return Block(linears, norms)

    def final_norm(self) -> Norm:
        return self._norm(self.family.final_norm)

    def head(self) -> Linear | None:
        if self.spec.tied_head:
            return None
        return self._linear(self.family.head, (self.spec.vocab_size, self.spec.hidden_size), False)

    def load(self, progress: Callable[[float], None] | None = None) -> Weights:
        weights = self.frame()
        weights.blocks += self.blocks(progress)
        return weights

    def frame(self, held: Collection[str] = ()) -> Weights:
        """The model without its blocks. Of tables `held` elsewhere ("embed", "head") shapes are left."""
        gone = torch.empty(self.spec.vocab_size, self.spec.hidden_size, device="meta")
        embed = gone if "embed" in held else self.embed()
        head = Linear(gone) if "head" in held else self.head()
        return Weights(embed, self.positions(), [], self.final_norm(), head)

    def blocks(self, progress: Callable[[float], None] | None = None) -> Iterator[Block]:
        """One after another; what was read of the files is let go of in between."""
        for layer in range(self.spec.num_layers):
            yield self.block(layer)
            self.source.release()
            if progress:
                progress((layer + 1) / self.spec.num_layers)

    def _linear(self, name: str, shape: tuple[int, int], biased: bool) -> Linear:
        codec = self.codec_of(name)
        if codec is None:
            linear = Linear(self._stored(f"{name}.weight", shape))
        else:
            linear = self._decoded(name, codec)
            _check(name, shape_of(linear.weight), shape)
        if self.floats:
            linear = Linear(linear.weight if isinstance(linear.weight, Tensor) else dense(linear.weight))
        linear.bias = self._tensor(f"{name}.bias") if biased else None
        return linear

    def _decoded(self, name: str, codec: Codec) -> Linear:
        present = [n for n in codec.optional if f"{name}.{n}" in self.source]
        stored = {n: self.source.tensor(f"{name}.{n}") for n in (*codec.names, *present)}
        settings = for_linear(self.settings, name)
        try:
            weight, inputs = codec.decode(stored, settings), activations_of(settings, stored)
        except BrokenCheckpoint as error:
            raise BrokenCheckpoint(f"{name}: {error}", error.hint) from None
        if not bool(weight.scales.isfinite().all()):
            scales = next(n for n in codec.names if "scale" in n)
            raise BrokenCheckpoint(f"{name}.{scales} holds NaN or infinity", hint="quantize the model again")
        return Linear(weight.to(self.device), inputs=inputs)

    def _norm(self, name: str) -> Norm:
        bias = f"{name}.bias"
        biased = self.spec.norm == "layer" and bias in self.source
        return Norm(self._tensor(f"{name}.weight"), self._tensor(bias) if biased else None)

    def _stored(self, name: str, shape: tuple[int, int]) -> Table:
        """A matrix of one tensor: levels, or numbers."""
        weight = None if self.floats else self.source.levels(name)
        if weight is None:
            return self._shaped(name, shape)
        _check(name, weight.shape, shape)
        return weight.to(self.device)

    def _shaped(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._tensor(name)
        _check(name, tuple(tensor.shape), shape)
        return tensor

    def _tensor(self, name: str) -> Tensor:
        return self.source.tensor(name).to(self.device)


def _check(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise BrokenCheckpoint(
            f"{name}: expected {list(expected)}, found {list(found)}",
            hint="config.json and the weights are not of one model",
        )
