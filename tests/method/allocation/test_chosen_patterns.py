"""N:M with a choice of N for each linear: exact totals, plain patterns, refusals."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import RecipeError
from sparsellm.method.allocation.exact import round_to_groups
from sparsellm.patterns import parse_pattern
from tests.method.allocation.helpers import IDS
from tests.models import tiny_gpt2, tiny_llama
from tests.shares import violations

AUTO: dict[str, Any] = {"pattern": "auto:8", "sparsity": 0.5}


@given(
    st.lists(st.sampled_from([16, 32, 40, 48]), min_size=1, max_size=5),
    st.floats(0.13, 0.87),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_the_total_is_nearest_and_the_choice_best(
    groups: list[int], sparsity: float, data: st.DataObject
) -> None:
    weights = [8 * count for count in groups]
    shares = [
        min(max(sparsity + data.draw(st.floats(-0.15, 0.15)), 0.02), 0.98)
        for _ in weights
    ]
    goals = [share * count for share, count in zip(shares, weights, strict=True)]
    total = round(sum(goals))
    result = round_to_groups(goals, weights, 8, total)
    assert all(
        n * 8 % count == 0 and 1 <= n * 8 // count <= 7
        for n, count in zip(result, weights, strict=True)
    )

    def worth(zeros: Any) -> tuple[float, float]:
        costs = (
            (a - b) ** 2 / count
            for a, b, count in zip(zeros, goals, weights, strict=True)
        )
        return abs(sum(zeros) - total), sum(costs)

    choices = []
    for want, count in zip(goals, weights, strict=True):
        near = min(max(round(8 * want / count), 1), 7)
        choices.append(
            [
                zeros * count // 8
                for zeros in (near - 1, near, near + 1)
                if 1 <= zeros <= 7
            ]
        )
    off, cost = min(map(worth, itertools.product(*choices)))
    if off < max(groups):  # less than a step of the largest linear
        assert worth(result) == (pytest.approx(off), pytest.approx(cost))
    else:
        assert worth(result)[0] <= off


@pytest.mark.parametrize(
    "make", [tiny_llama, tiny_gpt2], ids=lambda make: make.__name__
)
@pytest.mark.parametrize("sparsity", [0.5, 0.625])
def test_every_linear_has_a_pattern_and_all_have_the_sparsity(
    make: Any, sparsity: float
) -> None:
    model = make()
    result = sparsellm.prune(
        model, Recipe(pattern="auto:8", sparsity=sparsity, effort=0), calibration=IDS
    )
    assert result.zeros == sparsity * result.weights
    assert result.allocation["name"] == "threshold"
    assert len({linear.pattern for linear in result.linears}) > 1
    for linear in result.linears:
        assert linear.pattern is not None
        pattern = parse_pattern(linear.pattern)
        assert pattern.m == 8
        assert pattern.sparsity == linear.asked
        weight = model.get_submodule(linear.name).weight
        assert violations(pattern, weight.T if make is tiny_gpt2 else weight) == 0
    assert [entry["pattern"] for entry in result.to_dict()["linears"]] == [
        linear.pattern for linear in result.linears
    ]


def test_a_total_that_sizes_forbid_is_the_nearest_one() -> None:
    result = sparsellm.prune(
        tiny_llama(),
        Recipe(pattern="auto:8", sparsity=0.51, method="wanda"),
        calibration=IDS,
    )
    # the smallest linear has 16 × 32 weights: half of the largest common divisor
    unit = 2 * 16 * 32 // 8
    assert abs(result.zeros - 0.51 * result.weights) <= unit
    # although the method's own is uniform
    assert result.allocation["name"] == "threshold"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"pattern": "auto:8", "sparsity": 0.9},
            r"auto:8 cannot reach sparsity 0.9, .* 1 to 8 - 1 of 8",
        ),
        ({"pattern": "auto:8", "sparsity": 0.0}, "cannot reach sparsity 0"),
        ({"pattern": "auto:1"}, "cannot reach sparsity 0.5"),
        (
            {"pattern": "auto:8", "sparsity": 0.5, "allocation": "uniform"},
            "uniform chooses none",
        ),
        (
            {"pattern": "auto:8", "sparsity": 0.5, "sparsity_of": {"*": 0.5}},
            "leave out sparsity_of",
        ),
        ({"pattern": "auto"}, "auto:m"),
    ],
)
def test_what_cannot_be_chosen_is_refused_at_the_door(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(**fields)


def test_an_m_that_does_not_divide_is_refused_by_name() -> None:
    with pytest.raises(
        RecipeError, match=r"weight has 32 inputs, which 5 does not divide"
    ):
        sparsellm.prune(
            tiny_llama(), Recipe(pattern="auto:5", sparsity=0.5), calibration=IDS
        )


def test_changes_of_a_recipe_keep_the_choice() -> None:
    recipe = Recipe(**AUTO)
    assert (
        recipe.updated(sparsity=0.6).pattern,
        recipe.updated(sparsity=0.6).sparsity,
    ) == ("auto:8", 0.6)
    assert Recipe(sparsity=0.6).updated(pattern="auto:8").sparsity == 0.6
    assert recipe.updated(pattern="2:4").sparsity == 0.5
    assert recipe.updated(pattern="1:4").sparsity == 0.75
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_an_allocation_without_a_span_is_the_plain_pattern() -> None:
    recipe = Recipe(
        **AUTO, method="wanda", allocation="threshold", allocation_options={"span": 0.0}
    )
    assert {
        linear.pattern
        for linear in sparsellm.prune(tiny_llama(), recipe, calibration=IDS).linears
    } == {"4:8"}
