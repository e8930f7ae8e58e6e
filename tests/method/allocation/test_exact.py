"""Totals are exact, whatever the sizes, the scores and the limits; and what cannot be met is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsellm.errors import RecipeError
from sparsellm.method.allocation.allocator import ALLOCATIONS, from_sparsities
from sparsellm.method.allocation.exact import (
    LARGEST,
    bounds,
    shift_to_total,
)
from sparsellm.patterns import round_exactly
from tests.method.allocation.helpers import bare_survey

SIZES = st.lists(st.integers(1, 10**9), min_size=1, max_size=30)
SHAPE = st.tuples(st.integers(1, 200), st.integers(1, 200))
SHAPES = st.lists(st.lists(SHAPE, min_size=1, max_size=4), min_size=1, max_size=6)
SPARSITY = st.floats(0, 0.999)


@given(SHAPES, SPARSITY, st.data())
@settings(max_examples=50, deadline=None)
def test_totals_and_counts_are_exact(
    shapes: list[list[tuple[int, int]]], sparsity: float, data: st.DataObject
) -> None:
    survey = bare_survey(shapes, sparsity)
    allocation = from_sparsities(
        survey, {linear.name: data.draw(st.floats(-3, 3)) for linear in survey.linears}
    )
    assert sum(allocation.zeros.values()) == round(
        sparsity * sum(a * b for block in shapes for a, b in block)
    )
    for linear in survey.linears:
        assert (
            0
            <= allocation.zeros[linear.name]
            <= max(LARGEST * linear.weights, math.ceil(sparsity * linear.weights))
        )


@given(SIZES, SPARSITY, st.floats(0, 1), st.data())
@settings(max_examples=50, deadline=None)
def test_within_limits_goals_are_met(
    weights: list[int], sparsity: float, span: float, data: st.DataObject
) -> None:
    total, limits = round(sparsity * sum(weights)), bounds(weights, sparsity, span)
    goals = shift_to_total(
        weights, [data.draw(st.floats(-1, 2)) for _ in weights], total, limits
    )
    result = round_exactly(goals, total, limits)
    assert sum(result) == total
    for zeros, real, low, high, count in zip(
        result, goals, *limits, weights, strict=True
    ):
        assert low <= zeros <= high
        assert abs(zeros - real) <= 1 + 1e-9 * count
        assert zeros / count >= sparsity - span - 1 / count
        assert zeros / count <= sparsity + span + 1 / count


def test_a_shift_moves_all_alike_where_no_limit_is_met() -> None:
    assert shift_to_total(
        [10, 30], [0.2, 0.6], 24, ([0, 0], [10, 30])
    ) == pytest.approx([3.0, 21.0])
    # the second is at its most, so the first makes up for it
    assert shift_to_total(
        [10, 30], [0.2, 0.6], 24, ([0, 0], [10, 18])
    ) == pytest.approx([6.0, 18.0])


def test_largest_remainders_round_up_within_the_limits() -> None:
    assert round_exactly([1.2, 2.7, 3.1], 7, ([0] * 3, [9] * 3)) == [1, 3, 3]
    assert round_exactly([1.5, 2.5, 3.0], 7, ([0] * 3, [9] * 3)) == [2, 2, 3]
    assert round_exactly([1.2, 2.7, 3.1], 9, ([0, 0, 0], [1, 9, 9])) == [1, 4, 4]
    with pytest.raises(ValueError, match="not between 0 and 3"):
        round_exactly([1.0, 1.0], 4, ([0, 0], [1, 2]))


def test_uniform_is_the_same_count_that_the_recipe_gives() -> None:
    survey = bare_survey([[(7, 9), (3, 5)], [(10, 10)]], 0.37)
    assert list(ALLOCATIONS["uniform"].function(survey).zeros.values()) == [
        round(0.37 * n) for n in (63, 15, 100)
    ]
    with pytest.raises(RecipeError, match=r"no finite sparsity for blocks\.0\.1"):
        from_sparsities(survey, {"blocks.0.0": 0.5, "blocks.1.0": 0.5})
