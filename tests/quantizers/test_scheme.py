from __future__ import annotations

import math
from typing import Any

import pytest

from nybble_models.errors import ModelError
from nybble_quantizers.scheme import Scheme, preset


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "magic"},
        {"bits": 1},
        {"bits": 9},
        {"group_size": 0},
        {"group_size": -2},
        {"samples": 0},
        {"length": 1},
        {"grid": 0},
        {"damp": -0.01},
        {"damp": math.nan},
        {"damp": math.inf},
    ],
    ids=str,
)
def test_nonsense_is_refused_in_one_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        Scheme(**wrong)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("scheme", "label"),
    [
        (Scheme(), "awq-w4g64"),
        (Scheme(method="rtn", group_size=128, symmetric=True), "rtn-w4g128-sym"),
        (Scheme(group_size=-1), "awq-w4channel"),
        (Scheme(method="none"), "w16"),
        (Scheme(target_bits=5.0), "awq-5bit-w4g64"),
        (Scheme(method="gptq", target_bytes=80_000_000, best=True), "gptq-80MB-w4g64-best"),
        (preset("W8A8"), "smoothquant-w8a8"),
        (preset("FP8-static"), "rtn-fp8-static"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_label_says_what_is_in_the_folder(scheme: Scheme, label: str) -> None:
    assert scheme.label == label


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("W8A8", {"target_bits": 5.0}, "a target chooses widths of integers"),
        ("FP8", {"target_bytes": 5000}, "a target chooses widths of integers"),
        ("W4A16", {"target_bits": 0.0}, "0 bits a weight is no target"),
        ("W4A16", {"target_bits": 16.0}, "16 bits a weight is no target"),
        ("W4A16", {"target_bits": math.nan}, "nan bits a weight is no target"),
        ("W4A16", {"target_bytes": 0}, "0 bytes are no target"),
        ("W16", {"target_bits": 5.0}, "rounds nothing"),
        ("W16", {"overrides": ("*=8",)}, "rounds nothing"),
        ("W16", {"ends": True}, "rounds nothing"),
        ("W4A16", {"method": "gptq", "order": "desc_act", "best": True}, "does not tune act-order"),
        ("W8A8", {"method": "gptq", "best": True}, "does not tune rounded inputs"),
        ("W8A8", {"best": True}, "does not tune rounded inputs"),
        ("W4A16-RTN", {"best": True}, "does not tune rtn"),
        (
            "W4A16",
            {"method": "gptq", "order": "desc_act", "ends": True},
            "gptq_v2 holds no quantized embedding",
        ),
        ("auto", {"widths": ()}, r"widths are \[\]"),
        ("auto", {"widths": (4, 9)}, r"widths are \[4, 9\]"),
        ("W4A16", {"method": "gptq", "format": "gptq"}, "gptq cannot hold every zero point"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_go_together_is_refused_at_once(name: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        preset(name, **changes)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_a_preset_can_be_changed() -> None:
    assert preset("W4A16", group_size=32) == preset("W4A16-g32")
    with pytest.raises(ModelError, match="W2A2") as caught:
        preset("W2A2")
    assert "W4A16" in caught.value.hint


def test_skip_patterns_are_shell_patterns() -> None:
    scheme = Scheme(skip=("*.down_proj", "model.layers.0.*"))
    assert scheme.skips("model.layers.7.mlp.down_proj")
    assert scheme.skips("model.layers.0.mlp.up_proj")
    assert not scheme.skips("model.layers.10.mlp.up_proj")
