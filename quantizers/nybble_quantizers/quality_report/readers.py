"""Which other programs read a checkpoint's format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from nybble_models.formats.overrides import summary
from nybble_quantizers.quality_report.record import Json, Record
from nybble_quantizers.quality_report.wording import bits_of

NEEDS = {
    None: "",
    "awq": " with `gptqmodel` and `accelerate`",
    "gptq": " with `gptqmodel` and `optimum`",
    "compressed-tensors": " with `compressed-tensors`",
}
"""What transformers wants to be installed, by `quant_method`."""

VLLM_BITS = {4, 8}  # of integer weights, those that vLLM has kernels for in every format


def readers(found: Record) -> Iterator[str]:
    """Programs that read the format, as far as their code says so: it has been read, not run with this file.

    A quantized head or embedding is left to nybble.
    """
    if not all(re.search(r"\.\d+\.", row.name) for row in found.rows):
        return
    rule, kind = summary(found.settings), found.settings.get("quant_method")
    if not _has_packed_zeros(found):
        yield f"[transformers](https://github.com/huggingface/transformers){NEEDS[kind]}"
    common = kind is None or set(bits_of(found)) <= VLLM_BITS
    held = {
        "awq": not rule.symmetric,
        "gptq": rule.symmetric,
        "compressed-tensors": not _has_integers_of_one_scale(found),
    }
    if common and held.get(str(kind), True):
        yield "[vLLM](https://github.com/vllm-project/vllm): `vllm serve FOLDER`"


def _has_integers_of_one_scale(found: Record) -> bool:
    """A scale for a whole matrix of integers: vLLM wants one a row at least."""
    weights = [group.get("weights") or {} for group in _groups(found)]
    return any(each.get("strategy") == "tensor" and each.get("type") == "int" for each in weights)


def _has_packed_zeros(found: Record) -> bool:
    """transformers 5.23 expects zeros that are not packed, but where it is told to unpack all at once."""
    return any(
        (group.get("format") or found.settings.get("format")) == "pack-quantized"
        and (group.get("weights") or {}).get("symmetric") is False
        for group in _groups(found)
    )


def _groups(found: Record) -> Iterable[Json]:
    return (found.settings.get("config_groups") or {}).values()
