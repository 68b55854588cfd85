from __future__ import annotations

import pytest

from nybble_models.errors import ModelError
from nybble_models.families import FAMILIES
from nybble_models.formats.form import CHANNEL, Form
from nybble_quantizers.override import Override, apply, parse_override
from nybble_quantizers.units import Unit, block_units, by_name, end_units
from support_tiny import tiny_spec

SPEC, FAMILY, BASE = tiny_spec("llama"), FAMILIES[0], Form(4, 32)
UNITS = (*block_units(SPEC), *end_units(SPEC))


def forms(*texts: str) -> dict[Unit, Form | None]:
    return apply([parse_override(text) for text in texts], UNITS, FAMILY, BASE)


@pytest.mark.parametrize(
    ("text", "override", "form"),
    [
        ("*.down_proj=8", Override("*.down_proj", 8), Form(8, 32)),
        ("*.o_proj=4g16", Override("*.o_proj", 4, 16), Form(4, 16)),
        ("a=b=16", Override("a=b", 16), None),
        ("*=8channel-sym", Override("*", 8, CHANNEL, True), Form(8, CHANNEL, True)),
        ("*=3-asym", Override("*", 3, None, False), Form(3, 32)),
    ],
    ids=["bits", "group", "16 bits", "channel", "symmetry"],
)
def test_an_override_changes_what_it_names(text: str, override: Override, form: Form | None) -> None:
    assert parse_override(text) == override
    assert override.form(BASE) == form


@pytest.mark.parametrize(
    "text", ["", "=8", "*.o_proj", "*=", "*=9", "*=1", "*=4g", "*=4g0", "*=16g32", "*=fp4", "*=4g32channel"]
)
def test_what_is_no_override_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ModelError, match="PATTERN=FORM") as caught:
        parse_override(text)
    assert "\n" not in str(caught.value)


def test_the_last_match_counts() -> None:
    found = forms("*.down_proj=8", "model.layers.1.*=16")
    assert found == {
        Unit(0, ("down",)): Form(8, 32),
        **{unit: None for unit in block_units(SPEC) if unit.layer == 1},
        Unit(2, ("down",)): Form(8, 32),
    }


def test_the_embedding_has_a_name_too() -> None:
    assert forms("model.embed_tokens=8g64") == {Unit(None, ("embed",)): Form(8, 64)}


def test_what_an_embedding_reads_is_not_rounded() -> None:
    base = Form(8, CHANNEL, True, inputs="token")
    found = apply([parse_override("*embed_tokens=8"), parse_override("*.o_proj=8")], UNITS, FAMILY, base)
    assert found[Unit(None, ("embed",))] == Form(8, CHANNEL, True)
    assert found[Unit(0, ("o",))] == base


def test_names_on_disk_carry_the_forms() -> None:
    named = by_name(FAMILY, forms("model.layers.2.self_attn.[qkv]_proj=8"))
    assert named == {f"model.layers.2.self_attn.{p}_proj": Form(8, 32) for p in "qkv"}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("*.v_proj=8",), "run as one"),
        (("*.[qkv]_proj=8", "*.1.self_attn.k_proj=16"), "model.layers.1.self_attn.q_proj"),
        (("*.fc1=8",), "matches no linear"),
    ],
    ids=["one partner", "an exception among partners", "no match"],
)
def test_what_cannot_be_is_refused(texts: tuple[str, ...], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        forms(*texts)
    assert caught.value.hint


def test_partners_may_be_named_one_by_one() -> None:
    assert forms(*(f"*.0.self_attn.{p}_proj=8" for p in "qkv")) == {Unit(0, ("q", "k", "v")): Form(8, 32)}
