"""Calibration text without a data set: the model writes it itself (the idea of LLM-QAT, Liu et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nybble_models.decoder import Decoder
from nybble_models.spec import ModelSpec
from nybble_models.weights import Weights


class Lockstep:
    """Keys and values of B sequences that grow together; every step is one token of each."""

    def __init__(self, spec: ModelSpec, sequences: int, length: int) -> None:
        shape = (spec.num_layers, sequences, length, spec.num_kv_heads, spec.head_dim)
        self.scale = spec.attention_scale
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)
        self.position = 0
        self.start = 0  # the decoder's rotary table holds one row for each sequence, see `_at`

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        """[B, H, E], [B, G, E], [B, G, E] -> [B, H, E]."""
        self.keys[layer, :, self.position] = key
        self.values[layer, :, self.position] = value
        first = 0 if window is None else max(0, self.position + 1 - window)
        seen = slice(first, self.position + 1)
        shared = query.reshape(len(query), key.shape[1], -1, query.shape[2])  # [B, G, H / G, E]
        scores = torch.einsum("bgre,blge->bgrl", shared, self.keys[layer, :, seen]) * self.scale
        return torch.einsum("bgrl,blge->bgre", scores.softmax(-1), self.values[layer, :, seen]).flatten(1, 2)


@torch.inference_mode()
def generate(
    spec: ModelSpec, weights: Weights, samples: int, length: int, seed: int, advance: Callable[[int], None]
) -> Tensor:
    """int64 [samples, length], sampled from the model at temperature 1.

    Each sequence opens with a token drawn from the whole vocabulary: all would start alike otherwise.
    `advance(tokens)` hears how many positions are done.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(spec, weights)
    angles = decoder.cos, decoder.sin
    cache = Lockstep(spec, samples, length)
    tokens = torch.empty(samples, length, dtype=torch.int64)
    tokens[:, 0] = torch.randint(spec.vocab_size, (samples,), generator=generator)
    for position in range(length - 1):
        cache.position = position
        _at(decoder, angles, position, samples)
        x = _embed(decoder, tokens[:, position], position)
        for layer in range(spec.num_layers):
            x = decoder.block(layer, x, cache)
        tokens[:, position + 1] = _draw(decoder.logits(x), generator)
        advance(position + 2)
    return tokens


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One id a row by inverting the cumulative distribution: `multinomial` draws a number for every entry."""
    reached = logits.double().softmax(-1).cumsum(-1)
    drawn = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64) * reached[:, -1:]
    return torch.searchsorted(reached, drawn, right=True).squeeze(1).clamp_(max=logits.shape[-1] - 1)


def _at(decoder: Decoder, angles: tuple[Tensor | None, Tensor | None], position: int, sequences: int) -> None:
    """Give all rows of a step the angle of one position: rows are sequences here, not positions."""
    cos, sin = angles
    if cos is not None and sin is not None:
        row = slice(position, position + 1)
        decoder.cos, decoder.sin = cos[row].expand(sequences, -1), sin[row].expand(sequences, -1)


def _embed(decoder: Decoder, tokens: Tensor, position: int) -> Tensor:
    """Learned positions count along a sequence, so embed one token and move the rest to its place."""
    x = decoder.weights.embed[tokens].float()
    if decoder.weights.positions is not None:
        x = x + decoder.weights.positions[position + decoder.spec.position_offset].float()
    return x
