"""In environment A: transformers, with GPTQModel and compressed-tensors, loads folders (see `reader`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from reader import Load, read
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from write_gptqmodel import load as by_gptqmodel


def by_transformers(folder: Path) -> torch.nn.Module:
    """float16 for kernels that know nothing else; compressed-tensors unpacks into any.

    Asymmetric compressed-tensors is unpacked when loaded: otherwise transformers 5.23 expects zeros that are
    not packed, and refuses its own partner's files. Then inputs are not rounded.
    """
    settings = config_of(folder)["quantization_config"]
    if settings["quant_method"] != "compressed-tensors":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cpu")
    asked = CompressedTensorsConfig(dequantize=asymmetric(settings))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=asked)


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf8"))
    return config


def asymmetric(settings: dict[str, Any]) -> bool:
    return not all(rule["weights"]["symmetric"] for rule in settings["config_groups"].values())


def loaders(folder: Path) -> dict[str, Load]:
    """Without transformers where linears have several forms (in GPTQ, or asymmetric), and for OPT's kernels.

    README.md says why.
    """
    config = config_of(folder)
    settings = config["quantization_config"]
    if settings["quant_method"] == "compressed-tensors":
        several = len(settings["config_groups"]) > 1
        return {} if several and asymmetric(settings) else {"transformers": by_transformers}
    if "dynamic" in settings or config["model_type"] == "opt":
        return {"gptqmodel": by_gptqmodel}
    return {"transformers": by_transformers, "gptqmodel": by_gptqmodel}


if __name__ == "__main__":
    read(loaders)
