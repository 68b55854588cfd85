"""The tokenizer inside a GGUF file, written as the files a Hugging Face folder has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from nybble_models.checkpoint import write_json
from nybble_models.errors import BrokenCheckpoint, UnsupportedModel
from nybble_models.formats.gguf_header import read_header

Metadata = Mapping[str, Any]

CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class Splitting:
    """How a byte-level tokenizer cuts text before merging: `tokenizer.ggml.pre` names one."""

    pattern: str | None = None  # None: GPT-2's own
    single_digits: bool = False
    composed: bool = False  # NFC first
    begins: bool = False  # adds BOS where the file does not say
    whole_words: bool = False  # a word that is a token is not merged up from bytes


SPLITTINGS: Mapping[str, Splitting] = {
    "default": Splitting(),
    "gpt-2": Splitting(),
    "smollm": Splitting(single_digits=True),
    "llama-bpe": Splitting(WORDS + r"\p{N}{1,3}" + SPACES, begins=True, whole_words=True),
    "qwen2": Splitting(WORDS + r"\p{N}" + SPACES, composed=True),
    "deepseek-r1-qwen": Splitting(WORDS + r"\p{N}" + SPACES, composed=True, begins=True),
}


def write_tokenizer(path: Path, directory: Path) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json of a GGUF file."""
    metadata = read_header(path).metadata
    try:
        tokenizer = build(metadata)
        config = _config(metadata)
    except (KeyError, IndexError, TypeError) as error:
        raise BrokenCheckpoint(
            f"{path}: its tokenizer is not complete ({error})", hint="convert the model to GGUF again"
        ) from None
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", config)
    write_json(directory / "generation_config.json", _generation(metadata))


def build(metadata: Metadata) -> Tokenizer:
    """The tokenizer as the `tokenizers` library runs it."""
    kind = metadata["tokenizer.ggml.model"]
    if kind not in BUILDERS:
        raise UnsupportedModel(
            f"GGUF tokenizer {kind!r} is not supported", hint=f"supported: {', '.join(BUILDERS)}"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    tokenizer = BUILDERS[kind](metadata, {token: i for i, token in enumerate(tokens)})
    types: Sequence[int] = metadata.get("tokenizer.ggml.token_type", ())
    for token, type_ in zip(tokens, types, strict=False):
        if type_ in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=type_ == CONTROL, normalized=False)])
    if _adds_bos(metadata):
        bos = _token(metadata, "bos")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, metadata["tokenizer.ggml.bos_token_id"])],
        )
    return tokenizer


def _byte_level(metadata: Metadata, vocabulary: dict[str, int]) -> Tokenizer:
    """GPT-2's kind: bytes as printable characters, merged by rank."""
    how = _splitting(metadata)
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=how.whole_words))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if how.single_digits else []
    if how.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(how.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=how.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if how.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _splitting(metadata: Metadata) -> Splitting:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in SPLITTINGS:
        raise UnsupportedModel(
            f"GGUF pre-tokenizer {name!r} is not supported", hint=f"supported: {', '.join(SPLITTINGS)}"
        )
    return SPLITTINGS[name]


def _sentencepiece(metadata: Metadata, vocabulary: dict[str, int]) -> Tokenizer:
    """Llama 2's kind: pieces merged by score, "▁" for a space, unknown characters as bytes."""
    merges = _merges(vocabulary, metadata["tokenizer.ggml.scores"])
    unknown = _token(metadata, "unknown") if "tokenizer.ggml.unknown_token_id" in metadata else "<unk>"
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend("▁")] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tail: list[Any] = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail]
    )
    return tokenizer


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others; the better the score of what is made, the earlier."""
    ranked = [
        (-scores[i], i, piece[:cut], piece[cut:])
        for piece, i in vocabulary.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    ranked.sort(key=lambda row: (row[0], row[1], vocabulary[row[2]], vocabulary[row[3]]))
    return [(left, right) for _, _, left, right in ranked]


BUILDERS: Mapping[str, Callable[[Metadata, dict[str, int]], Tokenizer]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}


def _adds_bos(metadata: Metadata) -> bool:
    implied = metadata["tokenizer.ggml.model"] == "llama" or _splitting(metadata).begins
    return bool(metadata.get("tokenizer.ggml.add_bos_token", implied))


def _token(metadata: Metadata, role: str) -> str:
    token: str = metadata["tokenizer.ggml.tokens"][metadata[f"tokenizer.ggml.{role}_token_id"]]
    return token


def _config(metadata: Metadata) -> dict[str, Any]:
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named = {
        field: _token(metadata, role)
        for field, role in roles.items()
        if f"tokenizer.ggml.{role}_token_id" in metadata
    }
    template = metadata.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": _adds_bos(metadata),
        "clean_up_tokenization_spaces": False,
        **named,
        **({"chat_template": template} if template else {}),
    }


def _generation(metadata: Metadata) -> dict[str, Any]:
    """Which ids end an answer; a chat model may have an end of turn beside its end of text."""
    ids = {role: metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos", "eot", "padding")}
    ends = sorted({i for i in (ids["eos"], ids["eot"]) if i is not None})
    found = {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids["padding"],
    }
    return {name: value for name, value in found.items() if value is not None}
