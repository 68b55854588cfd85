"""In environment B: llm-compressor quantizes a model by each recipe, writes it, and answers."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from peer import arguments, each
from recipe import Recipe
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

if not torch.accelerator.is_available():  # its AWQ pins memory for a device, which fails where there is none
    IntermediatesCache.pin_memory = lambda *arguments: None


def modifiers(recipe: Recipe) -> list[Any]:
    """Its defaults, apart from what the recipe names (so static act-order in GPTQ)."""
    weights = {
        "num_bits": recipe.bits,
        "type": "float" if recipe.floats else "int",
        "symmetric": recipe.symmetric,
        "strategy": "group" if recipe.group else "channel",
        "group_size": recipe.group,
    }
    inputs = {"num_bits": 8, "type": weights["type"], "symmetric": True, "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs if recipe.rounded else None,
    }
    settings: dict[str, Any] = {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    first = {"awq": AWQModifier, "smoothquant": SmoothQuantModifier}
    folds = [first[name]() for name in recipe.method.split("+") if name in first]
    rounding = GPTQModifier if "gptq" in recipe.method else QuantizationModifier
    return [*folds, rounding(**settings)]


def quantize(model: Path, calibration: Tensor, folder: Path, recipe: Recipe) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in calibration]
    samples = None if recipe.method == "rtn" else DataLoader(rows, batch_size=1)
    oneshot(model=loaded, dataset=samples, recipe=modifiers(recipe), num_calibration_samples=len(rows))
    loaded.save_pretrained(folder, save_compressed=True)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


if __name__ == "__main__":
    each(
        arguments(__doc__),
        quantize,
        load,
        {name: version(name) for name in ("llmcompressor", "transformers")},
    )
