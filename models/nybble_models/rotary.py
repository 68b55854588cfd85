"""Rotary position tables, with the scalings that long-context checkpoints use."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nybble_models.spec import ModelSpec, RotaryScaling


def rotary_table(spec: ModelSpec, length: int) -> tuple[Tensor, Tensor]:
    """(cos, sin), float32 [length, head_dim / 2]: the angle of pair i at position p is p · frequency[i]."""
    half = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    frequencies = 1.0 / spec.rotary_theta**half
    temperature = 1.0
    if spec.rotary_scaling is not None:
        frequencies, temperature = _scale(frequencies, spec, spec.rotary_scaling)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    return angles.cos() * temperature, angles.sin() * temperature


def _scale(frequencies: Tensor, spec: ModelSpec, scaling: RotaryScaling) -> tuple[Tensor, float]:
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    return _yarn(frequencies, spec, scaling)


def _llama3(frequencies: Tensor, scaling: RotaryScaling) -> Tensor:
    """Wavelengths above L/low are stretched, those below L/high kept, the rest interpolated (Llama 3.1)."""
    turns = scaling.original_positions * frequencies / (2 * math.pi)  # L / wavelength
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _yarn(frequencies: Tensor, spec: ModelSpec, scaling: RotaryScaling) -> tuple[Tensor, float]:
    """Interpolate pairs that turn less than `beta_slow` times in L, keep those above `beta_fast` (YaRN)."""

    def pair_with(turns: float) -> float:
        span = math.log(scaling.original_positions / (turns * 2 * math.pi))
        return spec.head_dim * span / (2 * math.log(spec.rotary_theta))

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), spec.head_dim - 1)
    ramp = (torch.arange(len(frequencies), dtype=torch.float32) - low) / max(high - low, 0.001)
    ramp = ramp.clamp(0, 1)
    temperature = scaling.attention_factor
    if temperature is None:
        temperature = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return ramp * frequencies / scaling.factor + (1 - ramp) * frequencies, temperature
