"""How folders are read in both environments: by each of their loaders, which then answers the prompts.

    python read_SIDE.py PROMPTS REPORT FOLDER...

Writes `<loader>.safetensors` into each folder, and a line of JSON for each loader and folder into the report.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peer import answers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

Load = Callable[[Path], torch.nn.Module]

_initialize = PreTrainedModel._init_weights


def _initialize_what_is_there(model: PreTrainedModel, module: torch.nn.Module) -> None:
    if not isinstance(module, torch.nn.Embedding) or hasattr(module, "weight"):
        _initialize(model, module)


PreTrainedModel._init_weights = _initialize_what_is_there  # a packed embedding has no `weight` to be drawn


def kernel(model: torch.nn.Module) -> str:
    """The class of the first layer's linears."""
    ends = ("layers.0.mlp.up_proj", "layers.0.fc1")
    return next(type(module).__name__ for name, module in model.named_modules() if name.endswith(ends))


def read(loaders: Callable[[Path], Mapping[str, Load]]) -> None:
    """`loaders` are a folder's, by the name of the package."""
    prompts, report = load_file(sys.argv[1])["prompts"], Path(sys.argv[2])
    for folder in map(Path, sys.argv[3:]):
        for name, load in loaders(folder).items():
            row: dict[str, Any] = {"folder": folder.name, "loader": name, "version": version(name)}
            started = time.perf_counter()
            try:
                model = load(folder)
                row["kernel"] = kernel(model)
                save_file({"logits": answers(model, prompts)}, folder / f"{name}.safetensors")
            except (
                Exception
            ) as error:  # others' programs may raise anything, and the next folder is to be read
                row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            row["seconds"] = round(time.perf_counter() - started, 1)
            with report.open("a", encoding="utf8") as file:
                file.write(json.dumps(row) + "\n")
