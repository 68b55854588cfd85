"""GGUF (llama.cpp's files) as a source: config and tensors in Hugging Face's terms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor
from nybble_models.errors import BrokenCheckpoint, UnsupportedModel
from nybble_models.families import FAMILIES, Family
from nybble_models.formats.gguf_header import TensorInfo, read_header

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
PROJECTIONS = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
NORMS = {
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
}
BLOCK = 32  # inputs that share a scale in Q4_0, Q4_1 and Q8_0
LLAMA3_POSITIONS = 8192  # what every Llama 3.x was trained on before its frequencies were stretched


class Gguf:
    """The loader's `Source` over one GGUF file, read lazily.

    `config` is the Hugging Face config that the metadata implies. llama.cpp interleaves the rows of q and k
    of the llama architecture for its own rotary order; that is undone here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_header(path)
        self.metadata: Mapping[str, Any] = header.metadata
        self._infos = header.tensors
        self._bytes = np.memmap(path, mode="r")
        self._architecture = self._known_architecture()
        self.config = self._config()
        self._family = next(f for f in FAMILIES if ARCHITECTURES[self._architecture] in f.architectures)
        self._stored = _stored_names(self._family, self.config["num_hidden_layers"])

    def release(self) -> None:
        """Pages of the file that were read count as memory of the process until it is mapped anew."""
        self._bytes = np.memmap(self.path, mode="r")

    def files(self) -> list[Path]:
        return [self.path]

    def _known_architecture(self) -> str:
        found = str(self.metadata.get("general.architecture"))
        if found not in ARCHITECTURES:
            raise UnsupportedModel(
                f"{self.path}: GGUF architecture {found!r} is not supported",
                hint=f"supported: {', '.join(ARCHITECTURES)}",
            )
        return found

    def _config(self) -> dict[str, Any]:
        try:
            sizes = self._sizes()
        except (KeyError, TypeError, ValueError) as error:
            raise BrokenCheckpoint(
                f"{self.path}: the metadata has no usable {error}", hint="convert the model to GGUF again"
            ) from None
        heads = {"tie_word_embeddings": "output.weight" not in self._infos, "torch_dtype": "float16"}
        return sizes | heads | self._biases() | self._rotary(sizes) | self._special_tokens()

    def _sizes(self) -> dict[str, Any]:
        heads, hidden = int(self._fact("attention.head_count")), int(self._fact("embedding_length"))
        return {
            "architectures": [ARCHITECTURES[self._architecture]],
            "model_type": self._architecture,
            "hidden_act": "silu",
            "vocab_size": self._infos["token_embd.weight"].shape[0],
            "hidden_size": hidden,
            "intermediate_size": int(self._fact("feed_forward_length")),
            "num_hidden_layers": int(self._fact("block_count")),
            "num_attention_heads": heads,
            "num_key_value_heads": int(self._fact("attention.head_count_kv", heads)),
            "head_dim": int(self._fact("attention.key_length", hidden // heads)),
            "max_position_embeddings": int(self._fact("context_length")),
            "rms_norm_eps": _shortest(self._fact("attention.layer_norm_rms_epsilon")),
        }

    def _fact(self, name: str, default: Any = None) -> Any:
        value = self.metadata.get(f"{self._architecture}.{name}", default)
        if value is None:
            raise KeyError(f"{self._architecture}.{name}")
        return value

    def _biases(self) -> dict[str, bool]:
        if self._architecture == "qwen2":
            return {}
        return {
            "attention_bias": "blk.0.attn_output.bias" in self._infos,
            "mlp_bias": "blk.0.ffn_up.bias" in self._infos,
        }

    def _rotary(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        theta = _shortest(self._fact("rope.freq_base", 10000.0))
        kind = self._fact("rope.scaling.type", "none")
        scaling: dict[str, Any] | None = None
        if "rope_freqs.weight" in self._infos:
            scaling = self._llama3_scaling(theta, sizes["head_dim"])
        elif kind != "none":
            scaling = {"rope_type": kind, "factor": _shortest(self._fact("rope.scaling.factor", 1.0))}
            trained = self._fact("rope.scaling.original_context_length", 0)
            scaling |= {"original_max_position_embeddings": int(trained)} if trained else {}
        return {"rope_theta": theta} | ({"rope_scaling": scaling} if scaling else {})

    def _llama3_scaling(self, theta: float, head_dim: int) -> dict[str, Any]:
        """Llama 3.1 files hold the stretch of each frequency; find the parameters that made them."""
        stored = self._dense("rope_freqs.weight")
        factor = float(stored.max())
        pairs = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        turns = LLAMA3_POSITIONS / (theta**pairs * 2 * torch.pi)
        blend = ((turns - 1) / 3).clamp(0, 1)
        made = 1 / ((1 - blend) / factor + blend)
        if stored.shape != made.shape or not torch.allclose(stored, made, rtol=1e-3):
            raise UnsupportedModel(
                f"{self.path}: its rope_freqs are not those of Llama 3",
                hint="use the safetensors form of the model",
            )
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": LLAMA3_POSITIONS,
        }

    def _special_tokens(self) -> dict[str, int]:
        keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
        found = {name: self.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
        return {name: int(value) for name, value in found.items() if value is not None}

    def __contains__(self, name: str) -> bool:
        return self._stored.get(name) in self._infos

    def names(self) -> list[str]:
        """The Hugging Face names of the tensors that are there."""
        return [name for name in self._stored if name in self]

    def tensor(self, name: str) -> Tensor:
        """float32, dequantized. Raises `BrokenCheckpoint` when the tensor is not there."""
        return self._in_rotary_order(name, self._dense(self._stored_name(name)))

    def levels(self, name: str) -> QuantizedTensor | None:
        """The stored levels themselves, of a Q4_0, Q4_1 or Q8_0 matrix; None for any other type.

        Raises `BrokenCheckpoint` when the tensor is not there, or a scale is no number.
        """
        info = self._infos[self._stored_name(name)]
        if info.kind not in DECODERS or len(info.shape) != 2:
            return None
        raw = torch.from_numpy(self._raw(info)).view(info.shape[0], info.shape[1] // BLOCK, -1)
        weight = DECODERS[info.kind](raw)
        if not all(bool(t.isfinite().all()) for t in (weight.scales, weight.offsets())):
            raise BrokenCheckpoint(
                f"{self.path}: {name} has a scale of NaN or infinity", hint="convert the model to GGUF again"
            )
        order = self._row_order(name, info.shape[0])
        return weight if order is None else weight.select(order)

    def kinds(self) -> tuple[Counter[Kind], Counter[Kind]]:
        """How many matrices there are of each type that `levels` reads, and of each that it does not."""
        matrices = Counter(info.kind for info in self._infos.values() if len(info.shape) == 2)
        return (
            Counter({kind: count for kind, count in matrices.items() if kind in DECODERS}),
            Counter({kind: count for kind, count in matrices.items() if kind not in DECODERS}),
        )

    def kind(self, name: str) -> Kind:
        """The type that a tensor is stored as. Raises `BrokenCheckpoint` when it is not there."""
        return self._infos[self._stored_name(name)].kind

    def _stored_name(self, name: str) -> str:
        stored = self._stored.get(name)
        if stored not in self._infos:
            raise BrokenCheckpoint(
                f"{self.path} has no tensor {name!r}", hint="convert the model to GGUF again"
            )
        return str(stored)

    def _raw(self, info: TensorInfo) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.array(self._bytes[info.offset : info.offset + info.nbytes])

    def _dense(self, stored: str) -> Tensor:
        info = self._infos[stored]
        rows = self._raw(info).reshape(*info.shape[:-1], -1)
        try:
            values = quants.dequantize(rows, info.kind)
        except NotImplementedError:
            raise UnsupportedModel(
                f"{self.path}: {stored} is of type {info.kind.name}, which cannot be read",
                hint="convert the model to Q8_0 or F16",
            ) from None
        return torch.from_numpy(values.reshape(info.shape).astype(np.float32, copy=False))

    def _in_rotary_order(self, name: str, tensor: Tensor) -> Tensor:
        order = self._row_order(name, tensor.shape[0])
        return tensor if order is None else tensor[order]

    def _row_order(self, name: str, rows: int) -> Tensor | None:
        """Where each row of a llama q or k lies in the file: pairs (2i, 2i + 1) become (i, i + E/2)."""
        projection = next((p for p in "qk" if f"self_attn.{p}_proj." in name), None)
        if self._architecture != "llama" or projection is None:
            return None
        heads = self.config["num_attention_heads" if projection == "q" else "num_key_value_heads"]
        return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def _stored_names(family: Family, layers: int) -> dict[str, str]:
    """Hugging Face name -> name in the file."""
    stems = {family.embed: "token_embd", family.final_norm: "output_norm", family.head: "output"}
    for layer in range(layers):
        for names, stored in ((family.projections, PROJECTIONS), (family.norms, NORMS)):
            stems |= {name.format(i=layer): f"blk.{layer}.{stored[role]}" for role, name in names.items()}
    return {
        f"{stem}.{part}": f"{stored}.{part}" for stem, stored in stems.items() for part in ("weight", "bias")
    }


def _shortest(value: Any) -> float:
    """A float32 as the decimal it was made from: 9.999999747378752e-06 is 1e-05."""
    return float(str(np.float32(value)))


def _q4_0(raw: Tensor) -> QuantizedTensor:
    """fp16 scale, 16 bytes: the low nibbles are inputs 0..15, the high nibbles 16..31. w = scale (q - 8)."""
    return QuantizedTensor(_nibbles(raw[..., 2:]), _halves(raw, 0), bits=4, group_size=BLOCK)


def _q4_1(raw: Tensor) -> QuantizedTensor:
    """fp16 scale, fp16 minimum, nibbles as in Q4_0. w = scale q + minimum."""
    return QuantizedTensor(
        _nibbles(raw[..., 4:]), _halves(raw, 0), bits=4, group_size=BLOCK, minimums=_halves(raw, 2)
    )


def _q8_0(raw: Tensor) -> QuantizedTensor:
    """fp16 scale, 32 signed bytes. w = scale q."""
    codes = (raw[..., 2:] ^ 128).flatten(1)  # signed q as the unsigned level q + 128
    return QuantizedTensor(codes, _halves(raw, 0), bits=8, group_size=BLOCK)


DECODERS: Mapping[Kind, Callable[[Tensor], QuantizedTensor]] = {
    Kind.Q4_0: _q4_0,
    Kind.Q4_1: _q4_1,
    Kind.Q8_0: _q8_0,
}


def _nibbles(packed: Tensor) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), dim=-1).flatten(1)


def _halves(raw: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of each block, as float32."""
    return raw[..., start : start + 2].contiguous().view(torch.float16).float().squeeze(-1)
