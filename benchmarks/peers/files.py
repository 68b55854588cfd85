"""The model in every form that a subject reads, made once and kept in one folder."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from environments import run
from llama_cpp_peer import requantize
from random_gguf import SHAPES, write
from safetensors.torch import save_file
from subjects import Files
from wire import Failed

from nybble.config import ServeConfig
from nybble_models.checkpoint import write_json
from nybble_models.formats.gguf import Gguf
from nybble_models.formats.gguf_tokenizer import write_tokenizer
from nybble_models.hub import DEFAULT, fetch

Say = Callable[[str], None]
PATIENCE = 600.0  # seconds that making a file may take


class Store:
    """A folder of files, each made when it is first asked for and complete once it has its name."""

    def __init__(self, folder: Path, say: Say) -> None:
        self.folder, self.say = folder, say
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, make: Callable[[Path], None]) -> Path | None:
        """None, and a line, where it cannot be made."""
        path = self.folder / name
        if not path.exists():
            self.say(f"making {path}")
            part = path.with_name(f"part-{path.name}")
            discard(part)  # of a run that was cut short
            try:
                make(part)
            except Failed as failure:
                self.say(f"without {name}: {failure}")
                return None
            part.rename(path)
        return path


def discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def tokenizer_of(source: Path, store: Store) -> Path:
    """The folder with tokenizer.json."""
    if source.is_dir():
        return source

    def make(target: Path) -> None:
        target.mkdir(exist_ok=True)
        write_tokenizer(source, target)

    made = store(f"{source.stem}-tokenizer", make)
    assert made is not None
    return made


def default_gguf(cache: str) -> Path:
    """The GGUF file of the default model. Raises `ModelError`, or `Failed` where it is a folder."""
    found = fetch(DEFAULT, ServeConfig(cache_dir=cache).cache_path)
    if found.is_dir():
        raise Failed(f"{found} is no GGUF file: give one with --model")
    return found


def of_model(source: Path, peers: dict[str, Path], store: Store, default: str | None) -> Files:
    """What the peers at hand need of a GGUF file; a folder is for ours alone."""
    if source.is_dir():
        return Files(source)
    stem = source.stem
    return Files(
        source,
        q4_0=q4_0(source, peers, store),
        floats=store(f"{stem}-bfloat16", lambda to: floats(source, to)) if "transformers" in peers else None,
        awq=store(f"{stem}-awq", lambda to: awq(source, to)) if "vllm" in peers else None,
        default=default,
    )


def of_shape(name: str, peers: dict[str, Path], store: Store, tokenizer: Path) -> Files:
    """Random weights: nothing to serve as text, and nothing to quantize."""
    source = store(f"{name}-random-Q4_1.gguf", lambda to: write(to, SHAPES[name], tokenizer))
    assert source is not None
    return Files(source, q4_0=q4_0(source, peers, store), served=False)


def q4_0(source: Path, peers: dict[str, Path], store: Store) -> Path | None:
    if "llama.cpp" not in peers:
        return None
    name = source.name.replace("Q4_1", "Q4_0") if "Q4_1" in source.name else f"Q4_0-{source.name}"

    def make(target: Path) -> None:
        step = requantize(peers["llama.cpp"], source, target)
        run(step.command, store.folder / "q4_0.log", time.monotonic() + PATIENCE)

    return store(name, make)


def floats(source: Path, target: Path) -> None:
    """A Hugging Face folder in bfloat16."""
    target.mkdir(exist_ok=True)
    model = Gguf(source)
    tensors = {name: model.tensor(name).to(torch.bfloat16).contiguous() for name in model.names()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    architecture = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    write_json(target / "config.json", architecture | dict(model.config) | {"torch_dtype": "bfloat16"})
    write_tokenizer(source, target)


def awq(source: Path, target: Path) -> None:
    """Our AWQ in its own format, as other engines read it; it takes minutes. Raises `Failed`."""
    command = (sys.executable, "-m", "nybble", "quantize", str(source), "-o", str(target), "--format", "awq")
    run(command, target.with_name("awq.log"), time.monotonic() + PATIENCE)
