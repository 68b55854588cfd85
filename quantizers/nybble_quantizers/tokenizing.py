"""The tokenizer of a model: run on calibration text, and carried over into the quantized folder."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from tokenizers import Tokenizer

from nybble_models import tokenizer
from nybble_models.errors import ModelError
from nybble_models.formats import gguf_tokenizer
from nybble_models.formats.gguf_header import read_header

log = logging.getLogger("nybble.quantize")

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
    return tokenizer.load_tokenizer(source)


def carry_over(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files, or make them: of a GGUF file, or tokenizer.json of the older files."""
    if source.is_file():
        gguf_tokenizer.write_tokenizer(source, folder)
        return
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not (folder / tokenizer.FILE).is_file() and any((folder / name).is_file() for name in tokenizer.PARTS):
        try:
            load_tokenizer(source).save(str(folder / tokenizer.FILE))
        except ModelError as error:  # the last step of a long run: the weights do not need it
            log.warning("no %s is written: %s", tokenizer.FILE, error)
