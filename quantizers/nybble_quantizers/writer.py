"""A model's parts -> stored tensors under the family's names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor
from nybble_models.errors import BrokenCheckpoint
from nybble_models.families import Family
from nybble_models.formats.codec import Codec
from nybble_models.loader import Loader
from nybble_models.weights import Block, Norm
from nybble_quantizers.output import ShardWriter


class ModelWriter:
    """Quantized linears through the codec, other matrices as float16, norms and biases as float32.

    Norms and biases are small, and a fold divides them by any number.
    """

    def __init__(self, folder: Path, family: Family, codec: Codec) -> None:
        self.shards = ShardWriter(folder)
        self.family = family
        self.codec = codec

    def block(self, layer: int, block: Block) -> None:
        for projection, linear in block.linears.items():
            name = self.family.projections[projection].format(i=layer)
            if isinstance(linear.weight, QuantizedTensor):
                for part, tensor in self.codec.encode(linear.weight).items():
                    self.shards.add(f"{name}.{part}", tensor, "linear")
            else:
                self._matrix(name, linear.weight, "linear")
            if linear.bias is not None:
                self.shards.add(f"{name}.bias", linear.bias.float(), "linear")
        for role, norm in block.norms.items():
            self._norm(self.family.norms[role].format(i=layer), norm)

    def rest(self, loader: Loader) -> None:
        """Embeddings, final norm, and the head where it is not the embedding."""
        self._matrix(self.family.embed, loader.embed(), "embedding")
        positions = loader.positions()
        if positions is not None and self.family.positions is not None:
            self._matrix(self.family.positions, positions, "embedding")
        self._norm(self.family.final_norm, loader.final_norm())
        head = loader.head()
        if head is not None and isinstance(head.weight, Tensor):
            self._matrix(self.family.head, head.weight, "head")

    def _matrix(self, name: str, tensor: Tensor, kind: str) -> None:
        half = tensor.to(torch.float16)
        if not bool(half.isfinite().all()):
            raise BrokenCheckpoint(
                f"{name}.weight holds NaN, infinity or a number past float16",
                hint="the checkpoint is damaged; fetch it again",
            )
        self.shards.add(f"{name}.weight", half, kind)

    def _norm(self, name: str, norm: Norm) -> None:
        self.shards.add(f"{name}.weight", norm.weight.float(), "norm")
        if norm.bias is not None:
            self.shards.add(f"{name}.bias", norm.bias.float(), "norm")
