"""A model's parts -> stored tensors under the family's names."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from nybble_kernels.quantized import dense
from nybble_models.errors import BrokenCheckpoint
from nybble_models.families import Family
from nybble_models.formats.container import Container
from nybble_models.formats.form import Form
from nybble_models.loader import Loader
from nybble_models.weights import Block, Linear, Norm


class ModelWriter:
    """Quantized linears through the container's codecs, other matrices as float16, norms and biases float32.

    Norms and biases are small, and a fold divides them by any number. Nothing is written here: what the parts
    are stored as is returned, by full name, with its kind. With `exact` other matrices are of the narrowest
    type that holds each of their numbers.
    """

    def __init__(self, family: Family, container: Container, *, exact: bool = False) -> None:
        self.family = family
        self.container = container
        self.exact = exact

    def block(self, layer: int, block: Block, forms: Mapping[str, Form]) -> dict[str, tuple[str, Tensor]]:
        stored: dict[str, tuple[str, Tensor]] = {}
        for projection, linear in block.linears.items():
            name = self.family.projections[projection].format(i=layer)
            if isinstance(linear.weight, Tensor):
                stored |= self._matrix(name, linear.weight, "linear")
            else:
                parts = self.container.encode(linear, forms[projection])
                stored |= {f"{name}.{part}": ("linear", tensor) for part, tensor in parts.items()}
            if linear.bias is not None:
                stored[f"{name}.bias"] = "linear", linear.bias.float()
        for role, norm in block.norms.items():
            stored |= _norm(self.family.norms[role].format(i=layer), norm)
        return stored

    def rest(
        self, loader: Loader, rounded: Mapping[str, tuple[Linear, Form]] = MappingProxyType({})
    ) -> dict[str, tuple[str, Tensor]]:
        """Embeddings, final norm, and the head where it is not the embedding; `rounded` ones by name."""
        family = self.family
        stored = self._rounded("embedding", family.embed, rounded)
        if not stored:
            stored = self._matrix(family.embed, dense(loader.embed()), "embedding")
        positions = loader.positions()
        if positions is not None and family.positions is not None:
            stored |= self._matrix(family.positions, positions, "embedding")
        stored |= _norm(family.final_norm, loader.final_norm())
        if loader.spec.tied_head:
            return stored
        found = self._rounded("head", family.head, rounded)
        head = None if found else loader.head()
        return stored | (found if head is None else self._matrix(family.head, dense(head.weight), "head"))

    def _rounded(
        self, kind: str, name: str, rounded: Mapping[str, tuple[Linear, Form]]
    ) -> dict[str, tuple[str, Tensor]]:
        if name not in rounded:
            return {}
        parts = self.container.encode(*rounded[name])
        return {f"{name}.{part}": (kind, tensor) for part, tensor in parts.items()}

    def _matrix(self, name: str, tensor: Tensor, kind: str) -> dict[str, tuple[str, Tensor]]:
        stored = _narrowest(tensor) if self.exact else tensor.to(torch.float16)
        if not bool(stored.isfinite().all()):
            raise BrokenCheckpoint(
                f"{name}.weight holds NaN, infinity or a number past float16",
                hint="the checkpoint is damaged; fetch it again",
            )
        return {f"{name}.weight": (kind, stored)}


def _narrowest(tensor: Tensor) -> Tensor:
    """The same numbers at 16 bits if that loses nothing, else float32."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return tensor.to(dtype)
    return tensor.float()


def _norm(name: str, norm: Norm) -> dict[str, tuple[str, Tensor]]:
    stored = {f"{name}.weight": ("norm", norm.weight.float())}
    if norm.bias is not None:
        stored[f"{name}.bias"] = "norm", norm.bias.float()
    return stored
