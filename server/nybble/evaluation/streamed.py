"""A model in float32, straight from its files: the reference decoder, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from nybble.evaluation.model import CHUNK, Rows, Tell, Tokens
from nybble_kernels.quantized import dense
from nybble_models.decoder import Decoder
from nybble_models.hub import open_source
from nybble_models.loader import CPU, Loader
from nybble_models.weights import Block, Weights
from nybble_models.window import Window

STATES_BYTES = 1 << 30  # hidden states held at a time; texts beyond that make the blocks be read again


class Streamed:
    """All texts pass a block before the next one is read. Quantized weights mean what their codes say."""

    def __init__(self, path: Path, tell: Tell, name: str, device: torch.device = CPU) -> None:
        """`name`: what `tell` calls the phase. Raises `ModelError`."""
        self.path = path
        self._tell = tell
        self._name = name
        self._device = device
        self._loader = Loader(open_source(path), device=device)
        self.vocab_size = self._loader.spec.vocab_size
        self._held: tuple[Sequence[Tokens], Decoder, list[Tensor]] | None = None

    def run(self, texts: Sequence[Tokens]) -> Iterator[Rows]:
        groups = list(self._groups(texts))
        for part, group in enumerate(groups):
            phase = self._name if len(groups) == 1 else f"{self._name}, part {part + 1} of {len(groups)}"
            if self._held is None or self._held[0] != group:
                self._held = None  # freed before the next states are made
                self._held = (group, *self._states(group, phase))
            _, decoder, states = self._held
            for x in states:
                yield partial(self._rows, decoder, x)

    def _groups(self, texts: Sequence[Tokens]) -> Iterator[Sequence[Tokens]]:
        """Texts whose hidden states fit; a text that does not is alone."""
        room = STATES_BYTES // (4 * self._loader.spec.hidden_size)
        cuts, held = [0], 0
        for index, tokens in enumerate(texts):
            if held + len(tokens) > room and index > cuts[-1]:
                cuts.append(index)
                held = 0
            held += len(tokens)
        return (texts[low:high] for low, high in pairwise([*cuts, len(texts)]))

    @torch.inference_mode()
    def _states(self, texts: Sequence[Tokens], phase: str) -> tuple[Decoder, list[Tensor]]:
        """The hidden states [T, D] of every text before the final norm, and the decoder that has the head."""
        loader, spec = self._loader, self._loader.spec
        self._tell(phase, 0.0)
        blocks = [Block() for _ in range(spec.num_layers)]
        weights = Weights(loader.embed(), loader.positions(), blocks, loader.final_norm(), loader.head())
        decoder = Decoder(spec, weights)
        states = [decoder.embed(torch.tensor(tokens)).cpu() for tokens in texts]
        if weights.head is not None:
            weights.embed = torch.empty(0, spec.hidden_size)  # nobody looks at it any more
        for layer in range(spec.num_layers):
            blocks[layer] = _float(loader.block(layer))
            for index, x in enumerate(states):
                y = decoder.block(layer, x.to(self._device), Window(spec))
                states[index] = y.cpu()
                self._tell(phase, (layer + (index + 1) / len(states)) / spec.num_layers)
            blocks[layer] = Block()
        return decoder, states

    @torch.inference_mode()
    def _rows(self, decoder: Decoder, states: Tensor, first: int, stop: int) -> Iterator[Tensor]:
        for start in range(first, stop, CHUNK):
            yield decoder.logits(states[start : min(start + CHUNK, stop)].to(self._device))

    def describe(self) -> Mapping[str, object]:
        method = self._loader.settings.get("quant_method") or ("gguf" if self.path.is_file() else "none")
        return {
            "path": str(self.path),
            "engine": "reference",
            "quantization": method,
            "device": self._device.type,
            "dtype": "float32",
        }


def _float(block: Block) -> Block:
    """The block with weights as float32: they are used for every text."""
    for linear in block.linears.values():
        linear.weight = dense(linear.weight)
    return block
