"""The tokenizer of a model folder, as the `tokenizers` library runs it. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from nybble_models.errors import BrokenCheckpoint, ModelError

FILE = "tokenizer.json"
PARTS = ("vocab.json", "tokenizer.model")  # what older folders have in its place, OPT's merges.txt beside it


def load_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json, or where it is not, what transformers makes of the older files.

    Raises `ModelError` in one line where there is none, or none that can be read.
    """
    path = folder / FILE
    if not path.is_file():
        return _built(folder)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception
        raise BrokenCheckpoint(f"{path}: not a tokenizer: {error}", hint="download the file again") from None


def _built(folder: Path) -> Tokenizer:
    found = [name for name in PARTS if (folder / name).is_file()]
    if not found:
        raise ModelError(
            f"{folder}: no {FILE}, and no {' or '.join(PARTS)} to make one of",
            hint="the folder must hold the model's tokenizer",
        )
    try:
        from transformers import AutoTokenizer  # takes a second, and most folders need none of it

        made = AutoTokenizer.from_pretrained(
            folder, use_fast=True, local_files_only=True, trust_remote_code=False
        )
        core: Tokenizer = made.backend_tokenizer
    except Exception as error:  # whatever a library of theirs says of a file it cannot read
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BrokenCheckpoint(
            f"{folder}: no {FILE}, and none can be made of {found[0]} ({said})",
            hint=f"save the model's tokenizer with transformers, which writes {FILE}",
        ) from None
    return core
