"""Settings of one linear: the common ones, and what each method says of some linears in its own way."""

from __future__ import annotations

from typing import Any

import pytest

from nybble_models.errors import BrokenCheckpoint
from nybble_models.formats.compressed_tensors import IntQuantizedCodec, PackQuantizedCodec
from nybble_models.formats.form import Form
from nybble_models.formats.gptq import GptqCodec
from nybble_models.formats.overrides import Summary, for_linear, summary
from support_quantized import uniform

GROUPS = {
    "quant_method": "compressed-tensors",
    "format": "mixed-precision",
    "ignore": ["lm_head", "re:.*gate_proj"],
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 128}},
        "group_1": {"targets": ["re:.*down_proj"], "weights": {"num_bits": 8}},
        "group_2": {"targets": ["model.layers.0.self_attn.q_proj"], "weights": {"num_bits": 3}},
    },
}


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("model.layers.1.self_attn.q_proj", 4),
        ("model.layers.0.self_attn.q_proj", 3),
        ("model.layers.5.mlp.down_proj", 8),
    ],
)
def test_a_linear_has_the_settings_of_its_group(name: str, bits: int) -> None:
    assert for_linear(GROUPS, name)["weights"]["num_bits"] == bits


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.1.mlp.up_proj", (4, 128)),
        ("model.layers.1.mlp.down_proj", (8, 128)),
        ("model.layers.0.mlp.down_proj", (4, 128)),
    ],
)
def test_gptq_changes_settings_by_pattern(name: str, expected: tuple[int, int]) -> None:
    """The first pattern that fits counts."""
    dynamic = {r"-:model\.layers\.0\.": {}, r"+:.*down_proj$": {"bits": 8}, ".*": {}}
    found = for_linear({"bits": 4, "group_size": 128, "dynamic": dynamic}, name)
    assert (found["bits"], found["group_size"]) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (PackQuantizedCodec().settings(uniform(4, 32, True)), Summary(4, 32, True)),
        (IntQuantizedCodec().settings(uniform(8, -1, True, w8a8=True)), Summary(8, None, True, 8)),
        (GROUPS, Summary(4, 128, True)),
        (GptqCodec().settings(uniform(3, -1)), Summary(3, None, False)),
        ({"bits": 4, "group_size": 64, "zero_point": True, "sym": True}, Summary(4, 64, False)),
        ({}, Summary(None, None, None)),
    ],
    ids=["packed", "plain", "mixed", "gptq", "awq", "none"],
)
def test_every_method_says_its_bits_and_groups(settings: dict[str, Any], expected: Summary) -> None:
    assert summary(settings) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"dynamic": {"+:(": {"bits": 8}}},
        {"config_groups": {"group_0": {"targets": ["re:("], "weights": {}}}},
    ],
    ids=["dynamic", "targets"],
)
def test_a_pattern_that_is_none_is_named(settings: dict[str, Any]) -> None:
    with pytest.raises(BrokenCheckpoint, match=r"'\('"):
        for_linear(settings, "model.layers.0.mlp.up_proj")


def test_linears_left_out_of_gptq_are_named_by_pattern() -> None:
    """GPTQModel reads a pattern that begins with "-:" as "not quantized"."""
    name = "model.layers.0.mlp.up_proj"
    found = GptqCodec().settings(uniform(4, 32, True) | {name: None})
    assert found["dynamic"] == {r"-:^model\.layers\.0\.mlp\.up_proj$": {}}
    assert for_linear(found, name) == found
    assert "dynamic" not in GptqCodec().settings(uniform(4, 32, True))


def test_what_vllm_fuses_is_named_as_it_names_it() -> None:
    """vLLM asks for `qkv_proj` and `gate_up_proj`, and goes by the first pattern that fits."""
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    forms = uniform(4, 32, True) | {f"model.layers.{i}.self_attn.o_proj": Form(4, 32, True) for i in range(8)}
    forms |= {f"{attention}.{p}_proj": Form(8, 32, True) for p in "qkv"}
    forms |= {f"{mlp}.{p}_proj": None for p in ("gate", "up")} | {f"{mlp}.down_proj": Form(8, 32, True)}
    found = GptqCodec().settings(forms)
    assert found["dynamic"] == {
        r"+:^model\.layers\.1\.self_attn\.(q_proj|k_proj|v_proj|qkv_proj)$": {
            "bits": 8,
            "group_size": 32,
            "sym": True,
        },
        r"-:^model\.layers\.1\.mlp\.(gate_proj|up_proj|gate_up_proj)$": {},
        r"+:^model\.layers\.1\.mlp\.down_proj$": {"bits": 8, "group_size": 32, "sym": True},
    }
    for part in ("q_proj", "k_proj", "v_proj", "qkv_proj"):
        assert for_linear(found, f"{attention}.{part}")["bits"] == 8
    assert for_linear(found, f"{attention}.o_proj")["bits"] == 4
    assert for_linear(found, "model.layers.11.self_attn.qkv_proj")["bits"] == 4


def test_linears_of_another_form_are_named_in_gptq() -> None:
    name = "model.layers.1.mlp.down_proj"
    forms = uniform(4, 32, True) | {"model.layers.1.mlp.up_proj": Form(4, 32, True), name: Form(8, -1, True)}
    found = GptqCodec().settings(forms)
    assert (found["bits"], found["group_size"]) == (4, 32)
    own = for_linear(found, name)
    assert (own["bits"], own["group_size"], own["sym"]) == (8, -1, True)
    assert for_linear(found, "model.layers.1.mlp.up_proj") == found
