"""The `compressed-tensors` package, which vLLM and transformers load with, as the judge of our codecs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nybble_kernels.activations import Activations
from nybble_kernels.float8 import Float8Tensor
from nybble_kernels.quantized import QuantizedTensor
from nybble_models.checkpoint import Checkpoint
from nybble_models.decoder import Decoder
from nybble_models.formats.container import CONTAINERS
from nybble_models.formats.form import CHANNEL, TENSOR, Form
from nybble_models.loader import Loader
from nybble_models.weights import Linear
from nybble_quantizers import fp8, rtn
from support_checkpoint import write_checkpoint
from support_quantized import quantized

transformers = pytest.importorskip("transformers")
quantization = pytest.importorskip("compressed_tensors.quantization")
compressors = pytest.importorskip("compressed_tensors.compressors.base")
lifecycle = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
helpers = pytest.importorskip("compressed_tensors.quantization.utils")

NAME = "model.layers.0.self_attn.q_proj"
PACKED = [
    Form(bits, group, symmetric)
    for bits in range(2, 9)
    for group in (CHANNEL, 32)
    for symmetric in (True, False)
]
ROUNDED = [
    Form(8, group, True, kind, inputs)
    for kind in ("int", "float")
    for group, inputs in ((CHANNEL, "token"), (TENSOR, "tensor"))
]
BLOCKS = Form(8, 16, True, "float", "group")
FORMS = [*PACKED, *ROUNDED, Form(8, CHANNEL, inputs="token"), BLOCKS]
CONTAINER = CONTAINERS["compressed-tensors"]


def name_of(form: Form) -> str:
    return form.label if form.symmetric or form.inputs is None else f"{form.label}-asymmetric"


def rule_of(form: Form) -> dict[str, Any]:
    """What our config.json says of a linear in this form."""
    found: dict[str, Any] = CONTAINER.codec(form).settings({NAME: form})["config_groups"]["group_0"]
    return found


def theirs(form: Form) -> tuple[Any, Any]:
    """Their reading of that: the compressor of the format, and the scheme that it goes by."""
    scheme = quantization.QuantizationScheme(**rule_of(form))
    return compressors.BaseCompressor.get_value_from_registry(scheme.format), scheme


def weight(form: Form) -> QuantizedTensor | Float8Tensor:
    """48 outputs and 96 inputs: no multiple of 32 levels for zeros that lie along the outputs."""
    if form.kind == "float":
        generator = torch.Generator().manual_seed(0)
        floats = fp8.quantize(torch.randn(48, 96, generator=generator), form.group_size)
        blocks = torch.rand(3, 6, generator=generator).half().float().repeat_interleave(16, dim=0)
        return Float8Tensor(floats.values, blocks, 16) if form.blocks else floats
    made = quantized(48, 96, form.bits, form.group(96), "symmetric" if form.symmetric else "zeros", form.bits)
    scales = made.scales.half().float()
    if form.group_size == TENSOR:
        scales = scales[:1].expand_as(scales)
    return QuantizedTensor(made.codes, scales, made.bits, made.group_size, made.zeros)


def stored_by_us(form: Form) -> dict[str, Tensor]:
    inputs = Activations(form.kind, 0.5) if form.inputs == "tensor" else None
    return CONTAINER.encode(Linear(weight(form), inputs=inputs), form)


@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_they_read_what_we_write(form: Form) -> None:
    compressor, scheme = theirs(form)
    stored = stored_by_us(form)
    expected = {"input_scale"} if form.inputs == "tensor" else set()
    assert set(stored) == expected | set(compressor.compression_param_names(scheme))
    found = compressor.decompress(stored, scheme)["weight"]
    assert torch.equal(found, weight(form).dequantize(torch.float16))


@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_we_read_what_they_write(form: Form) -> None:
    made, ours = weight(form), stored_by_us(form)
    zeros = torch.zeros(ours["weight_scale"].shape)
    if isinstance(made, QuantizedTensor) and made.zeros is not None:
        zeros = made.zeros.float() - 2 ** (form.bits - 1)
    compressor, scheme = theirs(form)
    given = {
        "weight": made.dequantize(),
        "weight_scale": ours["weight_scale"],
        "weight_zero_point": zeros.to(torch.int8),
    }
    stored: dict[str, Tensor] = compressor.compress(given, scheme)
    found = CONTAINER.codec(form).decode(stored, rule_of(form))
    assert torch.equal(found.dequantize(), made.dequantize())
    assert set(stored) == set(ours) - {"input_scale"}
    assert all(torch.equal(ours[name].float(), stored[name].float()) for name in stored)


@pytest.mark.parametrize("form", ROUNDED, ids=name_of)
def test_inputs_are_rounded_as_they_round_them(form: Form) -> None:
    """But for a token's scale in int8: engines, and we, let 127 be the largest code, and they 127.5."""
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(1)) * 1.5
    assert form.inputs != "tensor" or form.kind != "int" or float(x.min()) < -128 * 0.02
    args = theirs(form)[1].input_activations
    scale = torch.tensor([0.02])
    zero = torch.zeros(1)
    if form.inputs == "token":
        scale, zero = helpers.compute_dynamic_scales_and_zp(x[None], args, None)
        scale, zero = scale[0] * (127.5 / 127 if form.kind == "int" else 1), zero[0]
    expected = lifecycle.fake_quantize(x, scale, zero, args)
    ours = Activations(form.kind, 0.02 if form.inputs == "tensor" else None).round(x)
    assert torch.allclose(ours, expected, rtol=1e-6, atol=1e-6)


def write(directory: Path, form: Form, at_once: bool) -> Path:
    """A tiny model with every linear but one in this form; `at_once` asks for float weights when loaded."""
    write_checkpoint(directory, group_size=None, model_type="llama", dtype="float32")
    stored, codec = load_file(directory / "model.safetensors"), CONTAINER.codec(form)
    forms: dict[str, Form | None] = {"model.layers.1.self_attn.o_proj": None}
    for name in [n.removesuffix(".weight") for n in stored if "_proj.weight" in n]:
        if forms.setdefault(name, form) is not None:
            matrix = stored.pop(f"{name}.weight")
            levels = rtn.quantize(matrix, form.bits, form.group(matrix.shape[1]), form.symmetric)
            stored |= {f"{name}.{part}": tensor for part, tensor in codec.encode(levels).items()}
    save_file(stored, directory / "model.safetensors")
    settings = codec.settings(forms) | {"dequantize": at_once}
    config = Checkpoint(directory).config | {"quantization_config": settings}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("form", "dtype"),
    [(Form(4, 32), torch.float16), (Form(3, CHANNEL, True), torch.float32)],
    ids=["unpacked when loaded", "unpacked when used"],
)
def test_transformers_answers_as_we_do(tmp_path: Path, form: Form, dtype: torch.dtype) -> None:
    """Asymmetric weights only when loaded (in the precision of the scales): it cannot hold packed zeros."""
    folder, tokens = write(tmp_path, form, dtype == torch.float16), torch.arange(40, 77)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        answered = model(tokens[None]).logits[0]
    loader = Loader(Checkpoint(folder))
    weights = loader.load()
    for linear in (linear for block in weights.blocks for linear in block.linears.values()):
        if isinstance(linear.weight, QuantizedTensor):
            linear.weight = linear.weight.dequantize(dtype).float()
    assert torch.allclose(answered, Decoder(loader.spec, weights).forward(tokens), rtol=1e-4, atol=1e-3)
