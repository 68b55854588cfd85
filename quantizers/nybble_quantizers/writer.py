"""A model's parts -> stored tensors under the family's names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor, dense
from nybble_models.errors import BrokenCheckpoint
from nybble_models.families import Family
from nybble_models.formats.container import Container
from nybble_models.formats.form import Form
from nybble_models.loader import Loader
from nybble_models.weights import Block, Norm


class ModelWriter:
    """Quantized linears through the container's codecs, other matrices as float16, norms and biases as float32.

    Norms and biases are small, and a fold divides them by any number. Nothing is written here: what the parts
    are stored as is returned, by full name, with its kind.
    """

    def __init__(self, family: Family, container: Container) -> None:
        self.family = family
        self.container = container

    def block(self, layer: int, block: Block, forms: Mapping[str, Form]) -> dict[str, tuple[str, Tensor]]:
        stored: dict[str, tuple[str, Tensor]] = {}
        for projection, linear in block.linears.items():
            name = self.family.projections[projection].format(i=layer)
            if isinstance(linear.weight, Tensor):
                stored |= _matrix(name, linear.weight, "linear")
            else:
                parts = self.container.codec(forms[projection]).encode(linear.weight)
                stored |= {f"{name}.{part}": ("linear", tensor) for part, tensor in parts.items()}
            if linear.bias is not None:
                stored[f"{name}.bias"] = "linear", linear.bias.float()
        for role, norm in block.norms.items():
            stored |= _norm(self.family.norms[role].format(i=layer), norm)
        return stored

    def rest(self, loader: Loader) -> dict[str, tuple[str, Tensor]]:
        """Embeddings, final norm, and the head where it is not the embedding."""
        family = self.family
        stored = _matrix(family.embed, dense(loader.embed()), "embedding")
        positions = loader.positions()
        if positions is not None and family.positions is not None:
            stored |= _matrix(family.positions, positions, "embedding")
        stored |= _norm(family.final_norm, loader.final_norm())
        head = loader.head()
        return stored if head is None else stored | _matrix(family.head, dense(head.weight), "head")


def _matrix(name: str, tensor: Tensor, kind: str) -> dict[str, tuple[str, Tensor]]:
    half = tensor.to(torch.float16)
    if not bool(half.isfinite().all()):
        raise BrokenCheckpoint(
            f"{name}.weight holds NaN, infinity or a number past float16",
            hint="the checkpoint is damaged; fetch it again",
        )
    return {f"{name}.weight": (kind, half)}


def _norm(name: str, norm: Norm) -> dict[str, tuple[str, Tensor]]:
    stored = {f"{name}.weight": ("norm", norm.weight.float())}
    if norm.bias is not None:
        stored[f"{name}.bias"] = "norm", norm.bias.float()
    return stored
