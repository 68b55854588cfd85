"""Folders as `nybble quantize` writes them: models of several kinds, quantized by every kind of scheme."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from material import CONFIGS

from nybble_models.formats.form import Form
from nybble_quantizers.override import parse_override
from nybble_quantizers.scheme import PRESETS, Scheme

GROUPS = Scheme(group_size=32)
GPTQ = replace(GROUPS, format="gptq", method="gptq", symmetric=True)
GPTQ_V2 = replace(GROUPS, format="gptq_v2", method="gptq")
PACKED = replace(GROUPS, format="compressed-tensors", method="gptq", symmetric=True)
MIXED = ("*.down_proj=8channel-sym", "*.o_proj=3g32", "model.layers.1.mlp.[gu]*=16")

SCHEMES: Mapping[str, Scheme] = {
    "awq": GROUPS,
    "gptq-sym": GPTQ,
    "gptq-sym-desc_act": replace(GPTQ, order="desc_act"),
    "gptq_v2-awq+gptq": replace(GPTQ_V2, method="awq+gptq"),
    "gptq_v2-desc_act": replace(GPTQ_V2, order="desc_act"),
    "gptq_v2-mixed": replace(GPTQ_V2, overrides=MIXED),
    "ct-w4-sym": PACKED,
    "ct-w3": replace(PACKED, method="awq+gptq", bits=3, symmetric=False),
    "ct-best": replace(PACKED, method="awq", best=True, steps=2),
    "ct-mixed": replace(PACKED, overrides=(*MIXED[:2], "model.layers.1.self_attn.o_proj=16")),
    "ct-target": replace(GROUPS, target_bits=5.0),
    "ct-embeddings": replace(PACKED, ends=True),
    "ct-w8a8": PRESETS["W8A8"],
    "ct-w8a8-static": replace(PRESETS["W8A8-static"], method="smoothquant+gptq"),
    "ct-fp8": PRESETS["FP8"],
    "ct-fp8-static": PRESETS["FP8-static"],
}

LEFT_OUT: Mapping[str, tuple[str, ...]] = {
    "llama": (),
    "qwen2": ("ct-embeddings",),
    "opt": ("gptq_v2-mixed", "ct-mixed", "ct-embeddings", "ct-w8a8", "ct-fp8"),
}
"""OPT's linears have other names than overrides give; no reader takes the others (README.md says why)."""


@dataclass(frozen=True)
class Case:
    """`model` is a row of `material.CONFIGS`."""

    model: str
    scheme: Scheme

    @property
    def forms(self) -> tuple[Form, ...]:
        base = self.scheme.form
        assert base is not None
        others = (parse_override(text).form(base) for text in self.scheme.overrides)
        return base, *(form for form in others if form is not None)

    @property
    def rounds(self) -> bool:
        """Whether inputs are rounded to scales found in a text: then one may fall the other way."""
        return self.scheme.inputs is not None


def _cases() -> Iterator[tuple[str, Case]]:
    """Calibrated on the windows of `material.make_texts`."""
    for model in CONFIGS:
        for name, scheme in SCHEMES.items():
            if name not in LEFT_OUT[model]:
                yield f"{model}-{name}", Case(model, replace(scheme, samples=8, length=64))


CASES: Mapping[str, Case] = dict(_cases())
