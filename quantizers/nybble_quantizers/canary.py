"""A few prompts with what the unquantized model makes of them, which a server can replay."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nybble_kernels.quantized import dense
from nybble_models.checkpoint import write_json
from nybble_models.decoder import Decoder
from nybble_models.errors import ModelError
from nybble_models.loader import Loader
from nybble_models.weights import Block, Weights
from nybble_models.window import Window
from nybble_quantizers.tokenizing import load_tokenizer
from nybble_quantizers.windows import Windows
from nybble_quantizers.workers import Map, in_turn

log = logging.getLogger("nybble.quantize")

FILE = "canary.json"
LENGTH = 32  # tokens of a prompt that are compared
TOP = 20  # candidates kept of each position
TOGETHER = 4  # prompts that pass an MLP at once: each alone would read its weights again

PROMPTS = (
    "The harbour was quiet that morning. Two fishermen mended their nets while the ferry, late as always, "
    "came slowly around the lighthouse and sounded its horn.",
    "To find the area of a triangle, multiply the length of its base by its height and divide the product by "
    "two. For example, a base of 6 and a height of 4 give 12.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n",
    "Question: Which planet is closest to the Sun?\nAnswer: Mercury.\n\n"
    "Question: How many legs has a spider?\nAnswer: Eight.\n",
    "In 1928 a Scottish physician returned from his holiday and noticed that a mould had killed the bacteria "
    "on one of his plates. The substance was later called penicillin.",
    "Dear Ms. Lindqvist,\n\nThank you for your letter of 14 March. We have looked into the delay and can now "
    "tell you that the parcel will arrive on Thursday.",
    "Die Bibliothek öffnet um neun Uhr. Wer ein Buch ausleihen möchte, braucht einen gültigen Ausweis und "
    "etwas Geduld.",
    '{"name": "kettle", "price": 24.5, "tags": ["kitchen", "steel"], "in_stock": true, "ratings": [5, 4, 5]}',
)


def canary_of(loader: Loader, source: Path) -> Canary | None:
    """None for a model without a tokenizer: nobody could send it a prompt."""
    try:
        tokenizer = load_tokenizer(source)
    except ModelError as error:
        log.warning("no canary is written: %s", error)
        return None
    return Canary(loader, tokenizer)


class Canary:
    """The prompts on their way through the unquantized model, a block at a time."""

    def __init__(self, loader: Loader, tokenizer: Tokenizer) -> None:
        spec = loader.spec
        self.loader = loader
        ids = [tokenizer.encode(prompt).ids[: min(LENGTH, spec.max_positions)] for prompt in PROMPTS]
        self.prompts = [torch.tensor(each) for each in ids if len(each) > 1]
        weights = Weights(
            loader.embed(), loader.positions(), [Block()] * spec.num_layers, loader.final_norm(), None
        )
        self.decoder = Decoder(spec, weights)
        self.states: list[Tensor] = [self.decoder.embed(prompt) for prompt in self.prompts]
        weights.embed = torch.empty(0, spec.hidden_size)  # read again when the last states are judged

    def advance(self, layer: int, block: Block, run: Map = in_turn) -> None:
        """Past a block in float32."""
        decoder = self.decoder

        def through(first: int) -> Sequence[Tensor]:
            found = list[Tensor]()
            for x in self.states[first : first + TOGETHER]:
                normed = decoder.norm(block.norms["attention_norm"], x)
                found.append(x + decoder.attention(block, layer, normed, Window(self.loader.spec)))
            x = torch.cat(found)
            x += decoder.mlp(block, decoder.norm(block.norms["mlp_norm"], x))
            return torch.split(x, [len(each) for each in found])

        parts = run(through, range(0, len(self.states), TOGETHER))
        self.states = [state for part in parts for state in part]

    def kept(self) -> dict[str, Windows]:
        """All that the next block needs to know of the blocks before it."""
        return {f"canary.{i}": Windows(state[None]) for i, state in enumerate(self.states)}

    def restore(self, kept: Mapping[str, Windows]) -> None:
        self.states = [kept[f"canary.{i}"][0].to(self.loader.device) for i in range(len(self.prompts))]

    def write(self, folder: Path) -> None:
        """After the last block: token ids, and the likeliest next tokens of each, with natural logarithms."""
        weights = self.decoder.weights
        weights.head = self.loader.head()
        if weights.head is None:
            weights.embed = dense(self.loader.embed())
        rows = list[dict[str, Any]]()
        for first in range(0, len(self.prompts), 2):  # two read the head once; more hold many predictions
            ends = [state[:-1] for state in self.states[first : first + 2]]
            logits = torch.split(self.decoder.logits(torch.cat(ends)), [len(end) for end in ends])
            rows += map(_row, self.prompts[first : first + 2], logits)
        write_json(folder / FILE, {"reference": "unquantized, float32", "prompts": rows})
        weights.embed, weights.head = torch.empty(0, self.loader.spec.hidden_size), None


def _row(prompt: Tensor, logits: Tensor) -> dict[str, Any]:
    """logits: [T - 1, V]"""
    found = logits.topk(min(TOP, logits.shape[1]))
    logprobs = found.values - logits.logsumexp(-1, keepdim=True)
    return {
        "tokens": prompt.tolist(),
        "top": found.indices.tolist(),
        "logprobs": [[round(value, 5) for value in row] for row in logprobs.tolist()],
    }
