"""GPTQ: levels as bits along the inputs, zeros along the outputs (Frantar et al. 2023; AutoGPTQ's files).

    qweight int32 [K·b/32, N] · qzeros int32 [G, N·b/32] · scales float16 [G, N] · g_idx int32 [K]

Column n of qweight and row g of qzeros are streams of b-bit levels (see `bitstream`): at 4 bits, nibble j of
qweight row r is input 8r + j, nibble j of qzeros column c is output 8c + j. Input k uses group `g_idx[k]`.
In v1 (`checkpoint_format` "gptq") a zero is stored less one, in v2 ("gptq_v2") as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor, Weight
from nybble_models.errors import BrokenCheckpoint
from nybble_models.formats import act_order, bitstream
from nybble_models.formats.codec import form_of, levels_of, needs_floats
from nybble_models.formats.form import Form, rule

WIDTHS = (2, 3, 4, 8)
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # a one in every level of a word
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What vLLM makes one linear of, by the name under which it then looks for it."""

EXCHANGED = (0x00000000, 0xB6DB6DB7, 0x49249249)
"""The symmetric 3-bit zero of older GPTQModels in v1: they mixed up the ones of words 0 and 2."""


@dataclass(frozen=True)
class GptqCodec:
    """2, 3, 4 or 8 bits, symmetric or not, in any group size.

    `version` and `act_order` say what `encode` writes; `decode` goes by the file. v1 has no zero 0, and
    GPTQModel takes asymmetric v1 from itself alone: asymmetric weights are better off in v2.
    """

    version: Literal[1, 2] = 1
    act_order: bool = False

    method = "gptq"
    names = ("qweight", "qzeros", "scales")
    optional = ("g_idx",)

    def reads(self, settings: Mapping[str, Any]) -> bool:
        return True

    def decode(self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> QuantizedTensor:
        bits = _bits(settings)
        qweight, qzeros, scales = (tensors[name] for name in self.names)
        inputs, outputs = qweight.shape[0] * 32 // bits, qweight.shape[1]
        group = settings.get("group_size") or -1
        size = min(group, inputs) if group > 0 else inputs
        groups = -(-inputs // size)
        if (
            tuple(scales.shape) != (groups, outputs)
            or tuple(qzeros.shape) != (groups, bitstream.words(outputs, bits))
            or {qweight.dtype, qzeros.dtype} != {torch.int32}
        ):
            raise BrokenCheckpoint(
                f"qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and scales {list(scales.shape)} "
                f"do not belong together at {bits} bits with group_size {group}",
                hint="is quantization_config of another model? else download the checkpoint again",
            )
        zeros = _zeros(qzeros, bits, outputs, settings)
        weight = QuantizedTensor(
            codes=bitstream.unpack(qweight.T, bits, inputs),
            scales=scales.float().T.contiguous(),
            bits=bits,
            group_size=size,
            zeros=None if zeros is None else zeros.T.contiguous(),
        )
        return act_order.in_groups(weight, tensors["g_idx"]) if "g_idx" in tensors else weight

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        weight = levels_of(weight)
        reason = self.fits(weight.shape, form_of(weight)) or self._cannot_say(weight)
        if reason:
            raise ValueError(reason)
        codes, g_idx = act_order.by_input(weight)
        zeros = weight.zeros
        if zeros is None:
            zeros = torch.full(weight.scales.shape, 2 ** (weight.bits - 1), dtype=torch.uint8)
        if self.version == 1:
            zeros = zeros - 1
        return {
            "qweight": bitstream.pack(codes, weight.bits).T.contiguous(),
            "qzeros": bitstream.pack(zeros.T, weight.bits),
            "scales": weight.scales.T.to(torch.float16).contiguous(),
            "g_idx": g_idx.to(torch.int32),
        }

    def _cannot_say(self, weight: QuantizedTensor) -> str | None:
        if weight.minimums is not None:
            return "GPTQ holds integer zero points, not real minimums"
        if weight.permutation is not None and not self.act_order:
            return "an act-order weight needs GptqCodec(act_order=True)"
        if not torch.equal(weight.scales.half().float(), weight.scales):
            return "GPTQ holds float16 scales, and these are not"
        if self.version == 1 and weight.zeros is not None and not bool(weight.zeros.all()):
            return "GPTQ v1 has no zero point 0; v2 does"
        return None

    def fits(self, shape: tuple[int, int], form: Form) -> str | None:
        bits = form.bits
        if (reason := needs_floats(form)) is not None:
            return reason
        if bits not in WIDTHS:
            return f"GPTQ holds 2, 3, 4 or 8-bit weights, not {bits}-bit"
        whole = bitstream.whole(bits)
        for count, name in zip(shape, ("outputs", "inputs"), strict=True):
            if count % whole:
                return f"{count} {name} are not a multiple of {whole}, which {bits}-bit words need"
        return None

    def settings(self, forms: Mapping[str, Form | None]) -> dict[str, Any]:
        form = rule(forms.values())
        dynamic: dict[str, Any] = {}
        for name, found in forms.items():
            if found is None:
                dynamic[f"-:{_pattern(name, forms)}"] = {}
            elif found != form:
                changed = {"bits": found.bits, "group_size": found.group_size, "sym": found.symmetric}
                dynamic[f"+:{_pattern(name, forms)}"] = changed
        return {
            "quant_method": self.method,
            "bits": form.bits,
            "group_size": form.group_size,
            "desc_act": self.act_order,
            "sym": form.symmetric,
            "lm_head": False,
            "true_sequential": True,
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            "pack_dtype": "int32",
        } | ({"dynamic": dynamic} if dynamic else {})


def _pattern(name: str, forms: Mapping[str, Form | None]) -> str:
    """Of one linear; of all that vLLM fuses with it and of the fused one, where they are alike."""
    parent, _, last = name.rpartition(".")
    for fused, parts in FUSED.items():
        names = [f"{parent}.{part}" for part in parts]
        if last in parts and forms.keys() >= set(names) and len({forms[each] for each in names}) == 1:
            return rf"^{re.escape(parent)}\.({'|'.join((*parts, fused))})$"
    return f"^{re.escape(name)}$"


def _bits(settings: Mapping[str, Any]) -> int:
    bits, layout = settings.get("bits"), _layout(settings)
    dtype = settings.get("pack_dtype") or "int32"
    if bits not in WIDTHS or layout not in ("gptq", "gptq_v2") or dtype != "int32":
        raise BrokenCheckpoint(
            f"GPTQ with bits={bits}, checkpoint_format={layout!r}, pack_dtype={dtype!r} is not supported",
            hint="2, 3, 4 and 8 bits as gptq or gptq_v2 in int32 words are",
        )
    return int(bits)


def _layout(settings: Mapping[str, Any]) -> str:
    return settings.get("checkpoint_format") or settings.get("format") or "gptq"


def _zeros(qzeros: Tensor, bits: int, outputs: int, settings: Mapping[str, Any]) -> Tensor | None:
    """uint8 [G, N], or None where every zero is the middle one of a symmetric file.

    Labels lie: v2 zeros under a v1 label are common. A symmetric file has one zero throughout, and that says
    what it is. Otherwise the label is trusted.
    """
    middle = 2 ** (bits - 1)
    stored = bitstream.unpack(qzeros, bits, outputs)
    if settings.get("sym", True):
        if bool((stored == middle).all()) or bool((stored == middle - 1).all()):
            return None
        if bits == 3 and _exchanged(qzeros):
            return None
    if _layout(settings) == "gptq_v2":
        return stored
    if bits == 3:
        return (stored + 1) & 7
    return bitstream.unpack(_plus_one(qzeros, ONES[bits]), bits, outputs)


def _plus_one(qzeros: Tensor, ones: int) -> Tensor:
    """One more in each level, adding whole words as GPTQModel does.

    Its writer subtracts whole words, so a zero 0 has borrowed from its neighbour, and this gives it back.
    """
    total = (qzeros.to(torch.int64) + ones) & 0xFFFFFFFF
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def _exchanged(qzeros: Tensor) -> bool:
    found = qzeros.to(torch.int64) & 0xFFFFFFFF
    return qzeros.shape[1] % 3 == 0 and bool((found.reshape(-1, 3) == torch.tensor(EXCHANGED)).all())
