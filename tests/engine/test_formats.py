"""Checkpoints of every format answer as the weights that they mean, from the folder to the engine."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nybble.config import ServeConfig
from nybble.engine.build import build_engine
from nybble.inspection import inspect_model
from nybble_kernels.activations import Activations
from nybble_kernels.float8 import Float8Tensor
from nybble_kernels.quantized import QuantizedTensor
from nybble_models.checkpoint import Checkpoint
from nybble_models.decoder import Decoder
from nybble_models.errors import BrokenCheckpoint, UnsupportedModel
from nybble_models.formats.codec import Codec
from nybble_models.formats.compressed_tensors import (
    FloatQuantizedCodec,
    IntQuantizedCodec,
    PackQuantizedCodec,
)
from nybble_models.formats.gptq import GptqCodec
from nybble_models.loader import Loader
from support_checkpoint import write_checkpoint
from support_quantized import uniform
from support_runner import Collector, request
from support_tiny import round_to_nearest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PROMPT = list(range(40, 77))


@dataclass(frozen=True)
class Case:
    """A format, and the levels that are put into it."""

    codec: Codec
    bits: int = 4
    group: int = 32
    symmetric: bool = True
    order: bool = False
    w8a8: bool = False
    kind: Literal["int", "float"] = "int"

    @property
    def inputs(self) -> Activations | None:
        return Activations(self.kind) if self.w8a8 else None

    def levels(self, weight: Tensor) -> QuantizedTensor | Float8Tensor:
        """Scales are float16 numbers and zeros at least 1, so that every format can hold them."""
        if self.kind == "float":
            scales = (weight.abs().amax(1, keepdim=True) / 440).half().float()
            return Float8Tensor((weight / scales).to(torch.float8_e4m3fn), scales, weight.shape[1])
        inputs = weight.shape[1]
        permutation = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))
        size = inputs if self.group < 0 else self.group
        made = round_to_nearest(weight[:, permutation] if self.order else weight, size, self.bits)
        zeros = None if made.zeros is None or self.symmetric else made.zeros.clamp(min=1)
        return QuantizedTensor(
            made.codes, made.scales, self.bits, size, zeros, permutation=permutation if self.order else None
        )


CASES = {
    "gptq": Case(GptqCodec()),
    "gptq 3-bit act-order": Case(GptqCodec(version=2, act_order=True), 3, symmetric=False, order=True),
    "gptq 8-bit channel": Case(GptqCodec(), 8, -1),
    "pack-quantized": Case(PackQuantizedCodec(), symmetric=False),
    "int-quantized": Case(IntQuantizedCodec(), 8, -1, w8a8=True),
    "float-quantized": Case(FloatQuantizedCodec(), 8, -1, w8a8=True, kind="float"),
}


def write(directory: Path, case: Case, layers: int = 3, **changes: Any) -> tuple[Path, Path]:
    """A quantized folder, and the same with float weights of the same values."""
    folders = directory / "quantized", directory / "meant"
    for folder in folders:
        folder.mkdir(parents=True)
        write_checkpoint(folder, group_size=None, num_hidden_layers=layers)
    stored = load_file(folders[0] / "model.safetensors")
    meant = dict(stored)
    for name in [n for n in stored if "_proj.weight" in n]:
        levels = case.levels(stored.pop(name))
        meant[name] = levels.dequantize()
        stored |= {name.removesuffix("weight") + part: t for part, t in case.codec.encode(levels).items()}
    save_file(stored, folders[0] / "model.safetensors")
    save_file(meant, folders[1] / "model.safetensors")
    forms = uniform(case.bits, case.group, case.symmetric, case.w8a8)
    settings = case.codec.settings({n: f and replace(f, kind=case.kind) for n, f in forms.items()})
    configure(folders[0], settings | changes)
    return folders


def configure(folder: Path, settings: Mapping[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))


def logits(folder: Path, tokens: list[int], inputs: Activations | None = None) -> Tensor:
    """With the inputs of all linears rounded as given, unless the folder asks for something itself."""
    loader = Loader(Checkpoint(folder))
    weights = loader.load()
    for linear in (linear for block in weights.blocks for linear in block.linears.values()):
        linear.inputs = linear.inputs or inputs
    return Decoder(loader.spec, weights).forward(torch.tensor(tokens))


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_means_what_its_levels_mean(tmp_path: Path, name: str) -> None:
    quantized, meant = write(tmp_path, CASES[name])
    expected = logits(meant, PROMPT, CASES[name].inputs)
    assert torch.allclose(logits(quantized, PROMPT), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "kernels", "said"),
    [
        ("gptq", "torch", "gptq int4 g32 symmetric"),
        ("gptq 3-bit act-order", "numba", "gptq int3 g32 asymmetric act-order"),
        ("int-quantized", "torch", "compressed-tensors int8 g64 symmetric"),
        ("float-quantized", "numba", "compressed-tensors fp8 g64"),
        ("float-quantized", "torch", "compressed-tensors fp8 g64"),
    ],
)
def test_an_engine_answers_as_the_weights_mean(tmp_path: Path, name: str, kernels: str, said: str) -> None:
    """Greedy tokens are the best of the reference, or as good as."""
    quantized, meant = write(tmp_path, CASES[name])
    config = ServeConfig(model=str(quantized), kernels=kernels, kv_cache_tokens=512, threads=1)
    engine = build_engine(config, lambda phase, part: None)
    sink = Collector()
    engine.submit(request("a", PROMPT, 16), sink)
    made = sink.wait().tokens
    engine.stop()
    assert engine.info.quantization == said
    rows = logits(meant, PROMPT + made[:-1])[len(PROMPT) - 1 :]
    margins = [float(row.max() - row[token]) for row, token in zip(rows, made, strict=True)]
    assert len(made) == 16
    assert max(margins) < 0.15 * float(rows.std())


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        pytest.param("gptq", "w4a16 w8a16", id="gptq"),
        pytest.param("int-quantized", "w8a8 w8a16", id="w8a8"),
        pytest.param("float-quantized", "fp8 w8a16", id="fp8"),
    ],
)
def test_triton_answers_as_the_weights_mean(tmp_path: Path, name: str, kinds: str) -> None:
    """8-bit inputs are asked for by the checkpoint, and round more than weights do."""
    quantized, meant = write(tmp_path, CASES[name], layers=1)
    small: dict[str, Any] = {"kv_cache_tokens": 64, "max_num_seqs": 1, "max_num_batched_tokens": 16}
    config = ServeConfig(model=str(quantized), kernels="triton" if INTERPRETED else "auto", **small)
    engine = build_engine(config, lambda phase, part: None)
    sink = Collector()
    engine.submit(request("a", PROMPT[:6], 2), sink)
    made = sink.wait(120).tokens
    engine.stop()
    assert engine.info.kernels["decode"] == f"triton {kinds}"
    rows = logits(meant, PROMPT[:6] + made[:-1])[5:]
    margins = [float(row.max() - row[token]) for row, token in zip(rows, made, strict=True)]
    assert max(margins) < 0.3 * float(rows.std())


def test_inspection_names_the_method(tmp_path: Path) -> None:
    quantized, _ = write(tmp_path, CASES["gptq"])
    found = inspect_model(quantized)
    assert (found.method, found.group_size, found.symmetric) == ("gptq", 32, True)


def test_inspection_reads_groups_of_settings(tmp_path: Path) -> None:
    quantized, _ = write(tmp_path, CASES["pack-quantized"])
    found = inspect_model(quantized)
    assert (found.method, found.group_size, found.symmetric) == ("compressed-tensors", 32, False)


def test_one_checkpoint_may_mix_formats_and_floats(tmp_path: Path) -> None:
    """Layer 0 is packed at 4 bits, layer 1 is plain int8, layer 2 is not quantized."""
    packed, meant = write(tmp_path / "a", CASES["pack-quantized"])
    plain, other = write(tmp_path / "b", CASES["int-quantized"])
    parts = [load_file(f / "model.safetensors") for f in (packed, plain, meant, other)]

    def pick(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
        rest = {n: t for n, t in parts[2].items() if "layers.0" not in n and "layers.1" not in n}
        zero = {n: t for n, t in first.items() if "layers.0" in n}
        return rest | zero | {n: t for n, t in second.items() if "layers.1" in n}

    save_file(pick(parts[0], parts[1]), packed / "model.safetensors")
    save_file(pick(parts[2], parts[3]), meant / "model.safetensors")
    groups = {
        "group_0": PackQuantizedCodec().settings(uniform(4, 32))["config_groups"]["group_0"],
        "group_1": IntQuantizedCodec().settings(uniform(8, -1, True, w8a8=True))["config_groups"]["group_0"]
        | {"targets": [r"re:model\.layers\.1\."]},
    }
    configure(packed, {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": []})
    loader = Loader(Checkpoint(packed))
    kinds = [loader.block(layer).linears["q"].inputs for layer in range(3)]
    assert kinds == [None, Activations("int"), None]
    for group in groups.values():
        group["input_activations"] = None
    configure(packed, {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": []})
    assert torch.allclose(logits(packed, PROMPT), logits(meant, PROMPT), rtol=1e-4, atol=1e-4)


def test_gptq_may_change_settings_by_pattern(tmp_path: Path) -> None:
    """`dynamic` says that the whole file is 8-bit, against the 4 of the common settings."""
    quantized, meant = write(tmp_path, CASES["gptq 8-bit channel"], bits=4, dynamic={"+:.*": {"bits": 8}})
    assert torch.allclose(logits(quantized, PROMPT), logits(meant, PROMPT), rtol=1e-4, atol=1e-4)


def test_a_broken_linear_is_named(tmp_path: Path) -> None:
    quantized, _ = write(tmp_path, CASES["gptq"])
    stored = load_file(quantized / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.g_idx"] += 7
    save_file(stored, quantized / "model.safetensors")
    with pytest.raises(BrokenCheckpoint, match=r"model\.layers\.1\.mlp\.up_proj: g_idx"):
        logits(quantized, PROMPT)


def test_an_unknown_method_says_which_are_known(tmp_path: Path) -> None:
    quantized, _ = write(tmp_path, CASES["gptq"], quant_method="hqq")
    with pytest.raises(UnsupportedModel) as caught:
        logits(quantized, PROMPT)
    assert "awq, gptq, compressed-tensors" in caught.value.hint
