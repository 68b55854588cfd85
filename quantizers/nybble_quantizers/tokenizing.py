"""The tokenizer of a model: run on calibration text, and carried over into the quantized folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers import Tokenizer

from nybble_models.errors import ModelError
from nybble_models.formats import gguf_tokenizer
from nybble_models.formats.gguf_header import read_header

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


def load_tokenizer(source: Path) -> Tokenizer:
    """Raises `ModelError` when the model has none."""
    if source.is_file():
        return gguf_tokenizer.build(read_header(source).metadata)
    path = source / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{source} has no tokenizer.json", hint="calibration from a file needs the tokenizer"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception
        raise ModelError(f"{path} is not a tokenizer ({error})", hint="download the file again") from None


def carry_over(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files, or make them: of a GGUF file, of vocab.json where tokenizer.json is not."""
    if source.is_file():
        gguf_tokenizer.write_tokenizer(source, folder)
        return
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(source, use_fast=True).save_pretrained(folder)
