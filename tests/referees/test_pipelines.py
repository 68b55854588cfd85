"""What `benchmarks/referees` has others read of the pipeline: every case is written, and is what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from nybble_kernels.quantized import QuantizedTensor
from nybble_models.checkpoint import Checkpoint
from nybble_models.decoder import Decoder
from nybble_models.formats.container import CONTAINERS
from nybble_models.loader import Loader
from nybble_models.weights import Linear, Weights
from nybble_quantizers.scheme import Method
from support_process import ROOT

pytest.importorskip("transformers")
with (
    pytest.MonkeyPatch.context() as patch
):  # they are no package, and scripts elsewhere share names with them
    patch.syspath_prepend(ROOT / "benchmarks" / "referees")
    from material import CONFIGS, make_model, make_texts
    from pipelines import CASES, LEFT_OUT, SCHEMES
    from write_nybble import by_scheme

Written = Callable[[str], Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The folder of a model, or of a case, by its name."""
    work = tmp_path_factory.mktemp("referees")
    calibration = load_file(make_texts(work / "texts.safetensors"))["calibration"]

    @cache
    def folder(name: str) -> Path:
        if name in CONFIGS:
            return make_model(work / name, name)
        by_scheme(folder(CASES[name].model), calibration, work / name, CASES[name].scheme)
        return work / name

    return folder


def loaded(folder: Path) -> Weights:
    return Loader(Checkpoint(folder)).load()


def logits(folder: Path) -> torch.Tensor:
    tokens = torch.randint(3, 256, (48,), generator=torch.Generator().manual_seed(2))
    return Decoder(Loader(Checkpoint(folder)).spec, loaded(folder)).forward(tokens)


def linears(weights: Weights) -> Iterator[Linear]:
    return (linear for block in weights.blocks for linear in block.linears.values())


@pytest.mark.parametrize("name", CASES)
def test_what_the_pipeline_writes_is_read_back(written: Written, name: str) -> None:
    """Random weights lose much at 3 bits; bits in wrong places make it more than 1."""
    case = CASES[name]
    settings = Checkpoint(written(name)).config["quantization_config"]
    assert settings["quant_method"] == case.scheme.container.codec(case.forms[0]).method
    assert {linear.inputs is not None for linear in linears(loaded(written(name)))} == {case.rounds}
    found, expected = logits(written(name)), logits(written(case.model))
    assert float((found - expected).square().mean() / expected.square().mean()) < 0.2


def bits(linear: Linear) -> int:
    return linear.weight.bits if isinstance(linear.weight, QuantizedTensor) else 16


def biased(linear: Linear) -> bool:
    return linear.bias is not None and bool(linear.bias.any())


def ordered(linear: Linear) -> bool:
    return isinstance(linear.weight, QuantizedTensor) and linear.weight.permutation is not None


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        (
            "llama-awq",
            lambda w: any(bool((n.weight.half() != n.weight).any()) for n in w.blocks[0].norms.values()),
        ),
        ("llama-gptq-sym-desc_act", lambda w: all(map(ordered, linears(w)))),
        ("llama-gptq_v2-mixed", lambda w: {*map(bits, linears(w))} == {3, 4, 8, 16}),
        ("llama-ct-mixed", lambda w: {*map(bits, linears(w))} == {3, 4, 8, 16}),
        ("llama-ct-target", lambda w: len({*map(bits, linears(w))}) > 1),
        ("llama-ct-embeddings", lambda w: isinstance(w.embed, QuantizedTensor) and bits(w.head) == 8),
        ("qwen2-awq", lambda w: w.head is None and biased(w.blocks[0].linears["q"])),
        ("opt-awq", lambda w: all(map(biased, linears(w)))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_case_holds_what_others_are_to_read(
    written: Written, name: str, holds: Callable[[Weights], bool]
) -> None:
    assert holds(loaded(written(name)))


def test_every_model_method_and_container_is_among_them() -> None:
    assert {case.model for case in CASES.values()} == set(CONFIGS) == set(LEFT_OUT)
    assert {case.scheme.method for case in CASES.values()} == set(get_args(Method)) - {"none"}
    assert {case.scheme.container.name for case in CASES.values()} == set(CONTAINERS)
    assert {name for names in LEFT_OUT.values() for name in names} <= set(SCHEMES)
