"""What the programs of both environments share: their arguments, one model's answers, what a run took."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recipe import Recipe, read
from safetensors.torch import load_file, save_file
from torch import Tensor

ANSWERS = "answers.safetensors"


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path, help="a Hugging Face folder of float weights")
    parser.add_argument(
        "texts", type=Path, help="safetensors: calibration [n, T] and, to be answered, prompts"
    )
    parser.add_argument("out", type=Path, help="one folder a recipe appears in it")
    parser.add_argument("recipes", nargs="+", type=read)
    return parser.parse_args()


@torch.inference_mode()
def answers(model: torch.nn.Module, prompts: Tensor) -> Tensor:
    """float32 [prompts, T, V]: the logits of every position."""
    return torch.stack([model(input_ids=prompt[None]).logits[0].float() for prompt in prompts])


def peak() -> int:
    """Largest resident memory of this process in bytes. (`ru_maxrss` begins at what its parent held.)"""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf8"))
    return 1024 * int(found[1]) if found else 0


def each(
    options: argparse.Namespace,
    quantize: Callable[[Path, Tensor, Path, Recipe], None],
    load: Callable[[Path], torch.nn.Module] | None,
    versions: dict[str, str],
) -> None:
    """Quantize by every recipe, and let the writer itself answer the prompts; a failure is written down."""
    texts = load_file(options.texts)
    for recipe in options.recipes:
        folder = options.out / recipe.word
        row: dict[str, Any] = {"recipe": recipe.word, "versions": versions}
        started = time.perf_counter()
        try:
            quantize(options.model, texts["calibration"], folder, recipe)
            row["seconds"] = round(time.perf_counter() - started, 2)
            row["peak_bytes"] = peak()
            if load is not None and "prompts" in texts:
                save_file({"logits": answers(load(folder), texts["prompts"])}, folder / ANSWERS)
        except Exception as error:  # others' programs may raise anything, and the next recipe is to run
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        (options.out / f"{recipe.word}.json").write_text(json.dumps(row) + "\n", encoding="utf8")
