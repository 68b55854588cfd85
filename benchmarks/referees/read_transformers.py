"""In environment A: transformers, with GPTQModel and compressed-tensors, loads folders and answers.

    python read_transformers.py PROMPTS REPORT FOLDER...

Writes `<loader>.safetensors` into each folder, and a line of JSON for each loader and folder into the report.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peer import answers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from write_gptqmodel import load as by_gptqmodel


def by_transformers(folder: Path) -> torch.nn.Module:
    """float16 for kernels that know nothing else; compressed-tensors unpacks into any.

    Asymmetric compressed-tensors is unpacked when loaded: otherwise transformers 5.23 expects zeros that are
    not packed, and refuses its own partner's files. Then inputs are not rounded.
    """
    settings = settings_of(folder)
    if settings["quant_method"] != "compressed-tensors":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cpu")
    rules = settings["config_groups"].values()
    at_once = not all(rule["weights"]["symmetric"] for rule in rules)
    asked = CompressedTensorsConfig(dequantize=at_once)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=asked)


def settings_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf8"))
    settings: dict[str, Any] = config["quantization_config"]
    return settings


def loaders(folder: Path) -> dict[str, Callable[[Path], torch.nn.Module]]:
    """GPTQ with linears of several forms is not for transformers, which passes GPTQModel's rules over."""
    settings = settings_of(folder)
    if settings["quant_method"] == "compressed-tensors":
        return {"transformers": by_transformers}
    if "dynamic" in settings:
        return {"gptqmodel": by_gptqmodel}
    return {"transformers": by_transformers, "gptqmodel": by_gptqmodel}


def main() -> None:
    prompts, report = load_file(sys.argv[1])["prompts"], Path(sys.argv[2])
    for folder in map(Path, sys.argv[3:]):
        for name, load in loaders(folder).items():
            row = {"folder": folder.name, "loader": name, "version": version(name)}
            started = time.perf_counter()
            try:
                model = load(folder)
                row["kernel"] = type(model.get_submodule("model.layers.0.mlp.up_proj")).__name__
                save_file({"logits": answers(model, prompts)}, folder / f"{name}.safetensors")
            except (
                Exception
            ) as error:  # others' programs may raise anything, and the next folder is to be read
                row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            row["seconds"] = round(time.perf_counter() - started, 1)
            with report.open("a", encoding="utf8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
