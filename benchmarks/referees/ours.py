"""Our side of the table: a checkpoint of a tiny model in every format that we write, and what we answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nybble_kernels.activations import Activations
from nybble_kernels.quantized import QuantizedTensor, Weight
from nybble_models.checkpoint import read_json, write_json
from nybble_models.decoder import Decoder
from nybble_models.formats.container import CONTAINERS, Container
from nybble_models.formats.form import CHANNEL, TENSOR, Form
from nybble_models.formats.gptq import GptqCodec
from nybble_models.hub import open_source
from nybble_models.loader import Loader
from nybble_models.weights import Linear
from nybble_quantizers import fp8, rtn

ANSWERS = "answers.safetensors"
STATIC = 0.05  # a made scale of inputs: it has to be honoured, not to be good
W8A8 = Form(8, CHANNEL, True, inputs="token")
FP8 = Form(8, CHANNEL, True, "float", "token")
V1_ORDER = Container("gptq", lambda form: GptqCodec(act_order=True))
V2_ORDER = Container("gptq_v2", lambda form: GptqCodec(version=2, act_order=True))


@dataclass(frozen=True)
class Case:
    """A container and the form of its linears; `others` differ, by the end of their names."""

    container: Container
    form: Form
    others: tuple[tuple[str, Form | None], ...] = ()

    @property
    def ordered(self) -> bool:
        return self.container in (V1_ORDER, V2_ORDER)

    @property
    def forms(self) -> tuple[Form, ...]:
        return self.form, *(form for _, form in self.others if form is not None)

    @property
    def rounds(self) -> bool:
        """Whether inputs are rounded by a scale a token: then one may fall the other way."""
        return any(form.inputs == "token" for form in self.forms)

    def of(self, name: str) -> Form | None:
        return next((form for end, form in self.others if name.endswith(end)), self.form)


def _cases() -> Iterator[tuple[str, Case]]:
    awq, v1, v2, packed = (CONTAINERS[n] for n in ("awq", "gptq", "gptq_v2", "compressed-tensors"))
    yield "awq-w4g32", Case(awq, Form(4, 32))
    yield "awq-w4g64-sym", Case(awq, Form(4, 64, True))
    for bits in (2, 3, 4, 8):
        yield f"gptq-w{bits}g32-sym", Case(v1, Form(bits, 32, True))
        yield f"gptq_v2-w{bits}g32", Case(v2, Form(bits, 32))
    yield "gptq-w4channel-sym", Case(v1, Form(4, CHANNEL, True))
    yield (
        "gptq-mixed",
        Case(v1, Form(4, 32, True), (("down_proj", Form(8, 32, True)), ("1.mlp.up_proj", None))),
    )
    yield "gptq-w4g32-sym-order", Case(V1_ORDER, Form(4, 32, True))
    yield "gptq_v2-w4g32-order", Case(V2_ORDER, Form(4, 32))
    for form in (Form(4, 32, True), Form(4, 32), Form(4, CHANNEL, True), Form(3, 32, True), Form(8, CHANNEL)):
        yield f"ct-{form.label}", Case(packed, form)
    for form in (W8A8, FP8):
        static = replace(form, group_size=TENSOR, inputs="tensor")
        yield f"ct-{form.label}", Case(packed, form)
        yield f"ct-{static.label}", Case(packed, static)
    others = (
        ("down_proj", Form(8, CHANNEL, True)),
        ("v_proj", FP8),
        ("o_proj", W8A8),
        ("1.mlp.up_proj", None),
    )
    yield "ct-mixed", Case(packed, Form(4, 32, True), others)


CASES: Mapping[str, Case] = dict(_cases())


def levels(weight: Tensor, form: Form, ordered: bool) -> Weight:
    """Rounded to nearest; zeros at least 1, which GPTQ v1 needs."""
    inputs = weight.shape[1]
    if form.kind == "float":
        return fp8.quantize(weight, form.group_size)
    permutation = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs)) if ordered else None
    columns = weight if permutation is None else weight[:, permutation]
    whole = form.group_size == TENSOR
    made = rtn.quantize(columns, form.bits, form.group(inputs), form.symmetric, per_tensor=whole)
    zeros = None if made.zeros is None else made.zeros.clamp(min=1)
    return QuantizedTensor(
        made.codes, made.scales, made.bits, made.group_size, zeros, permutation=permutation
    )


def write(model: Path, folder: Path, case: Case) -> None:
    """`model` (a folder of one shard) with its linears in the case's forms."""
    folder.mkdir(parents=True)
    stored = load_file(model / "model.safetensors")
    forms = {n.removesuffix(".weight"): case.of(n.removesuffix(".weight")) for n in stored if "_proj." in n}
    for name, form in forms.items():
        if form is None:
            continue
        weight = levels(stored.pop(f"{name}.weight").float(), form, case.ordered)
        inputs = Activations(form.kind, STATIC) if form.inputs == "tensor" else None
        parts = case.container.encode(Linear(weight, inputs=inputs), form)
        stored |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    for source in model.glob("token*.json"):
        (folder / source.name).write_bytes(source.read_bytes())
    settings = case.container.codec(case.form).settings(forms)
    write_json(folder / "config.json", read_json(model / "config.json") | {"quantization_config": settings})


class HalfStep:
    """compressed-tensors' own grid for int8 inputs: codes -128 to 127, and a token's scale max|x| / 127.5.

    Engines, and we, take max|x| / 127: on a random model that makes several per cent of difference.
    """

    def round(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127.5
        return (x / scale).round().clamp(-128, 127) * scale


@torch.inference_mode()
def answers(folder: Path, prompts: Tensor) -> Tensor:
    """float32 [prompts, T, V] of the reference decoder, int8 inputs without a stored scale by `HalfStep`."""
    loader = Loader(open_source(folder))
    weights = loader.load()
    for linear in (linear for block in weights.blocks for linear in block.linears.values()):
        if linear.inputs is not None and linear.inputs.kind == "int" and linear.inputs.scale is None:
            grid: Any = HalfStep()
            linear.inputs = grid
    decoder = Decoder(loader.spec, weights)
    return torch.stack([decoder.forward(prompt) for prompt in prompts])
