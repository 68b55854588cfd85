"""Calibration text without a data set: the model writes it itself (the idea of LLM-QAT, Liu et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event

import torch
from torch import Tensor

from nybble_kernels.quantized import look_up
from nybble_models.decoder import Decoder
from nybble_models.spec import ModelSpec
from nybble_models.weights import Weights
from nybble_quantizers.workers import Map, in_turn

TOGETHER = 8  # sequences in lockstep: the work of one core, the same whatever the number of cores


class Lockstep:
    """Keys and values of B sequences that grow together; every step is one token of each."""

    def __init__(self, spec: ModelSpec, sequences: int, length: int, device: torch.device) -> None:
        shape = (spec.num_layers, sequences, length, spec.num_kv_heads, spec.head_dim)
        self.scale = spec.attention_scale
        self.keys, self.values = (torch.zeros(shape, device=device) for _ in range(2))
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


def generate(
    spec: ModelSpec,
    weights: Weights,
    samples: int,
    length: int,
    seed: int,
    advance: Callable[[int], None],
    run: Map = in_turn,
) -> Tensor:
    """int64 [samples, length], sampled from the model at temperature 1. Float32 weights: each step reads all.

    Each sequence opens with a token drawn from the whole vocabulary: all would start alike otherwise.
    `advance(positions)` hears how far the first `TOGETHER` sequences are.
    """
    stopped = Event()

    def part(first: int) -> Tensor:
        count = min(TOGETHER, samples - first)
        generator = torch.Generator().manual_seed((seed << 20) + first)
        sentences = _Sentences(spec, weights, count, length, generator)
        for position in range(length - 1):
            if stopped.is_set():
                break
            sentences.step(position)
            if first == 0:
                advance(position + 2)
        return sentences.tokens

    try:
        return torch.cat(run(part, range(0, samples, TOGETHER)))
    except BaseException:
        stopped.set()  # Ctrl-C need not wait for the parts that are still writing
        raise


class _Sentences:
    """A few sequences in lockstep, all rows of a step at one position."""

    def __init__(
        self, spec: ModelSpec, weights: Weights, count: int, length: int, generator: torch.Generator
    ) -> None:
        self.decoder = Decoder(spec, weights)
        self.angles = self.decoder.cos, self.decoder.sin
        self.cache = Lockstep(spec, count, length, weights.embed.device)
        self.generator = generator
        self.tokens = torch.empty(count, length, dtype=torch.int64)
        self.tokens[:, 0] = torch.randint(spec.vocab_size, (count,), generator=generator)

    def step(self, position: int) -> None:
        """Draw the tokens after `position`."""
        decoder = self.decoder
        self.cache.position = position
        _at(decoder, self.angles, position, len(self.tokens))
        x = _embed(decoder, self.tokens[:, position], position)
        for layer in range(decoder.spec.num_layers):
            x = decoder.block(layer, x, self.cache)
        self.tokens[:, position + 1] = _draw(decoder.logits(x).cpu(), self.generator)


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
    x = look_up(decoder.weights.embed, tokens)
    if decoder.weights.positions is not None:
        x = x + decoder.weights.positions[position + decoder.spec.position_offset].float()
    return x
