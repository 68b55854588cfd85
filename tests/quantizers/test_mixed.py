from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble_models.errors import ModelError
from nybble_models.formats.form import Form
from nybble_quantizers.mixed import Costs, Sizes, allocate, bits_of, byte_budget, sizes
from nybble_quantizers.units import Unit, block_units, end_units
from support_tiny import CONFIGS, tiny_spec

FORMS = (Form(3), Form(4), Form(8), None)
COSTS = st.one_of(st.integers(0, 6).map(float), st.floats(0, 1e-3))  # ties, and real ones


@st.composite
def problems(draw: st.DrawFn) -> tuple[Costs, Sizes, int]:
    """Up to five units of one to four forms, in which more bytes need not cost less."""
    costs: dict[Unit, dict[Form | None, float]] = {}
    nbytes: dict[Unit, dict[Form | None, int]] = {}
    for layer in range(draw(st.integers(1, 5))):
        unit, forms = Unit(layer, ("o",)), FORMS[: draw(st.integers(1, 4))]
        costs[unit] = {form: draw(COSTS) for form in forms}
        nbytes[unit] = {form: draw(st.integers(1, 30)) for form in forms}
    least, most = (sum(pick(of.values()) for of in nbytes.values()) for pick in (min, max))
    return costs, nbytes, draw(st.integers(least, most))


def best(costs: Costs, nbytes: Sizes, budget: int) -> tuple[float, int]:
    """By trying everything: the least cost, and the fewest bytes at which it is reached."""
    tried = (
        (math.fsum(costs[u][f] for u, f in choice), sum(nbytes[u][f] for u, f in choice))
        for choice in itertools.product(*([(unit, form) for form in costs[unit]] for unit in costs))
    )
    return min(result for result in tried if result[1] <= budget)


@given(problems())
@settings(max_examples=300, deadline=None)
def test_an_allocation_is_the_best_there_is(problem: tuple[Costs, Sizes, int]) -> None:
    costs, nbytes, budget = problem
    chosen = allocate(costs, nbytes, budget)
    assert list(chosen) == list(costs)
    assert sum(nbytes[u][f] for u, f in chosen.items()) <= budget
    found = math.fsum(costs[u][f] for u, f in chosen.items())
    assert found == pytest.approx(best(costs, nbytes, budget)[0], rel=1e-9, abs=1e-15)
    assert allocate(costs, nbytes, budget) == chosen


def test_of_equal_costs_the_fewest_bytes_win() -> None:
    unit = Unit(0, ("o",))
    equal: Costs = {unit: dict.fromkeys(FORMS, 1.0)}
    assert allocate(equal, {unit: dict(zip(FORMS, (3, 4, 8, 16), strict=True))}, 100) == {unit: Form(3)}


def test_bits_go_where_they_save_most() -> None:
    spec = tiny_spec("llama")
    candidates = dict.fromkeys(block_units(spec), (Form(4, 32), Form(8, 32)))
    touchy = Unit(1, ("down",))
    costs = {
        unit: {form: (9.0 if unit == touchy else 1.0) / form.bits for form in forms}
        for unit, forms in candidates.items()
    }
    nbytes = sizes(spec, candidates)
    more = nbytes[touchy][Form(8, 32)] - nbytes[touchy][Form(4, 32)]
    least = sum(of[Form(4, 32)] for of in nbytes.values())
    chosen = allocate(costs, nbytes, least + more)
    assert [unit for unit, form in chosen.items() if form == Form(8, 32)] == [touchy]


def test_a_target_is_kept_to_and_used_up() -> None:
    spec = tiny_spec("qwen3", tie_word_embeddings=False)
    units = [*block_units(spec), *end_units(spec)]
    candidates = dict.fromkeys(units, (Form(3, 32), Form(4, 32), Form(8, -1), None))
    costs = {u: {f: 4.0 ** -(16 if f is None else f.bits) for f in forms} for u, forms in candidates.items()}
    for target in (4.5, 6.0, 16.0):
        chosen = allocate(costs, sizes(spec, candidates), byte_budget(target, spec, units))
        assert target - 0.4 < bits_of(spec, chosen) <= target


def test_too_small_a_budget_is_refused_in_one_line() -> None:
    spec = tiny_spec("llama")
    candidates = dict.fromkeys(block_units(spec), (Form(4, 32), None))
    costs = {unit: dict.fromkeys(forms, 0.0) for unit, forms in candidates.items()}
    with pytest.raises(ModelError, match="too few") as caught:
        allocate(costs, sizes(spec, candidates), byte_budget(4.0, spec, list(candidates)))
    assert "\n" not in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("bits", [0.0, -4.0, 16.5, math.nan])
def test_a_target_that_is_none_is_refused(bits: float) -> None:
    spec = tiny_spec("llama")
    with pytest.raises(ModelError, match="no target"):
        byte_budget(bits, spec, block_units(spec))


@pytest.mark.parametrize("name", CONFIGS)
def test_units_are_all_linears_once_with_partners_together(name: str) -> None:
    spec = tiny_spec(name)
    units = block_units(spec)
    parts = [(unit.layer, part) for unit in units for part in unit.parts]
    assert parts == [(layer, p) for layer in range(spec.num_layers) for p in spec.projections]
    assert Unit(0, ("q", "k", "v")) in units
    assert (Unit(2, ("gate", "up")) in units) == spec.gated
    everything = [*units, *end_units(spec)]
    learned = spec.max_positions * spec.hidden_size if spec.positions == "learned" else 0
    assert sum(u.nbytes(spec, None) for u in everything) == 2 * (spec.parameters - learned)


def test_bits_count_scales_and_zeros() -> None:
    spec = tiny_spec("llama")
    assert bits_of(spec, dict.fromkeys(block_units(spec), Form(4, 32))) == 4 + (16 + 4) / 32
    assert bits_of(spec, dict.fromkeys(block_units(spec))) == 16
