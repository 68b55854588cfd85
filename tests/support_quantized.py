"""Random quantized tensors of every kind, and the forms of models made of them."""

from __future__ import annotations

import torch

from nybble_kernels.quantized import QuantizedTensor
from nybble_models.formats.form import Form


def quantized(n: int, k: int, bits: int, group: int, kind: str, seed: int = 0) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k // group)
    return QuantizedTensor(
        codes=torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8),
        scales=torch.rand(n, groups, generator=generator) + 0.1,
        bits=bits,
        group_size=group,
        zeros=torch.randint(0, 2**bits, (n, groups), generator=generator, dtype=torch.uint8)
        if kind == "zeros"
        else None,
        minimums=-torch.rand(n, groups, generator=generator) if kind == "minimums" else None,
    )


def uniform(bits: int, group: int, symmetric: bool = False, w8a8: bool = False) -> dict[str, Form | None]:
    """The forms of a model whose linears are all alike: one stands for them."""
    return {"model.layers.0.self_attn.q_proj": Form(bits, group, symmetric, inputs="token" if w8a8 else None)}
