"""In environment A: GPTQModel quantizes a model by each recipe, writes it, and answers."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization.config import AWQConfig, BaseQuantizeConfig, GPTQConfig, RTNConfig
from peer import arguments, each
from recipe import Recipe
from torch import Tensor


def config(recipe: Recipe) -> BaseQuantizeConfig:
    """Its defaults, apart from what the recipe names (so group-aware order in GPTQ, unless act-order)."""
    common = {
        "bits": recipe.bits,
        "group_size": recipe.group or -1,
        "sym": recipe.symmetric,
        "device": "cpu",
        "offload_to_disk": False,
    }
    if recipe.method == "gptq":
        return GPTQConfig(
            **common, desc_act=recipe.order, act_group_aware=not recipe.order and bool(recipe.group)
        )
    return {"awq": AWQConfig, "rtn": RTNConfig}[recipe.method](**common)


def quantize(model: Path, calibration: Tensor, folder: Path, recipe: Recipe) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    dtype = torch.float16 if recipe.method == "awq" else torch.float32  # its AWQ packs nothing else
    loaded = GPTQModel.load(str(model), config(recipe), dtype=dtype)
    samples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in calibration]
    packing = (
        BACKEND.AWQ_TORCH if recipe.method == "awq" else BACKEND.AUTO
    )  # its own choice for AWQ needs CUDA
    loaded.quantize(None if recipe.method == "rtn" else samples, batch_size=1, backend=packing)
    loaded.save(str(folder))


def load(folder: Path) -> torch.nn.Module:
    """On its plain kernel: others of its kernels round scales to bfloat16."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf8"))["quantization_config"]
    backend = BACKEND.AWQ_TORCH if settings["quant_method"] == "awq" else BACKEND.GPTQ_TORCH
    loaded: torch.nn.Module = GPTQModel.load(
        str(folder), device="cpu", dtype=torch.float16, backend=backend
    ).model
    return loaded


if __name__ == "__main__":
    each(arguments(__doc__), quantize, load, {name: version(name) for name in ("gptqmodel", "transformers")})
