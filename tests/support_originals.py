"""Checkpoints as OPT's authors gave them out: pickled weights, and a tokenizer in parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from support_checkpoint import write_checkpoint

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
MERGES = [("a", "p"), ("ap", "p")]
_WORDS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(each) for each in MERGES)]
VOCABULARY = {word: i for i, word in enumerate(_WORDS)}
ROLES = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}


def write_new(folder: Path) -> Path:
    """The model as one would save it today: safetensors and tokenizer.json."""
    write_checkpoint(folder, "opt", group_size=None)
    core = tokenizers.Tokenizer(models.BPE(vocab=VOCABULARY, merges=MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, normalized=True) for text in ("<pad>", "</s>")])
    core.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    core.save(str(folder / "tokenizer.json"))
    _write_roles(folder)
    return folder


def write_original(new: Path, folder: Path, *, files: int = 1, prefix: str = "", zipped: bool = True) -> Path:
    """The same in so many .bin files; names begin with `prefix` and then "decoder."."""
    folder.mkdir(parents=True)
    shutil.copyfile(new / "config.json", folder / "config.json")
    stored = load_file(new / "model.safetensors")
    renamed = {prefix + name.removeprefix("model."): tensor for name, tensor in stored.items()}
    names = ["pytorch_model.bin"]
    if files > 1:
        names = [f"pytorch_model-{i + 1:05}-of-{files:05}.bin" for i in range(files)]
        listing = {each: names[i % files] for i, each in enumerate(renamed)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": listing}))
    for i, file in enumerate(names):
        held = {each: renamed[each] for each in list(renamed)[i::files]}
        torch.save(held, folder / file, _use_new_zipfile_serialization=zipped)
    write_parts(folder)
    return folder


def write_parts(folder: Path) -> Path:
    """vocab.json and merges.txt, and nothing that says how they are put together but the class."""
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))
    _write_roles(folder)
    return folder


def _write_roles(folder: Path) -> None:
    config = ROLES | {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
