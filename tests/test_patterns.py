"""Patterns against sorting, brute force and counting; never against their own output."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsellm.errors import NumericalError, RecipeError
from sparsellm.patterns import (
    NM,
    Pattern,
    Unstructured,
    even_part,
    most_kept,
    parse_pattern,
    strictest,
)
from tests.shares import Share, violations


def scores_of(rows: int, columns: int, levels: int, seed: int) -> torch.Tensor:
    """Scores (rows, columns) with at most this many different values: few make many ties."""
    return torch.randint(
        levels, (rows, columns), generator=torch.Generator().manual_seed(seed)
    ).float()


shapes, seeds = st.tuples(st.integers(1, 9), st.integers(1, 40)), st.integers(0, 99)


@settings(max_examples=60, deadline=None)
@given(shapes, st.floats(0, 0.999), st.sampled_from([1, 3, 16, 10**6]), seeds)
def test_matrix_mask_is_the_stable_sort_of_all_scores(shape, sparsity, levels, seed):
    scores = scores_of(*shape, levels, seed)
    values = scores.flatten().tolist()
    # the first of equals is kept
    ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))
    kept = set(ranked[: scores.numel() - round(sparsity * scores.numel())])
    assert {
        *Share(sparsity).mask(scores).flatten().nonzero().flatten().tolist()
    } == kept


@settings(max_examples=60, deadline=None)
@given(shapes, st.floats(0, 0.999), st.sampled_from([1, 3, 16, 10**6]), seeds)
def test_row_mask_is_the_stable_sort_of_each_row(shape, sparsity, levels, seed):
    scores = scores_of(*shape, levels, seed)
    mask = Share(sparsity).mask(scores, "row")
    assert int((~mask).sum()) == round(sparsity * scores.numel())
    counts = (~mask).sum(dim=1)
    assert counts.max() - counts.min() <= 1
    for row, kept in zip(scores.tolist(), mask.tolist(), strict=True):
        ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))
        assert {i for i, keep in enumerate(kept) if keep} == set(ranked[: sum(kept)])


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(2, 24),
    st.data(),
    st.sampled_from([1, 3, 10**6]),
    seeds,
)
def test_every_group_of_n_m_keeps_its_n_highest(rows, groups, m, data, levels, seed):
    n = data.draw(st.integers(1, m - 1))
    scores = scores_of(rows, groups * m, levels, seed)
    mask = NM(n, m).mask(scores)
    for group, kept in zip(
        scores.reshape(-1, m).tolist(), mask.reshape(-1, m).tolist(), strict=True
    ):
        assert {i for i, keep in enumerate(kept) if keep} == set(
            sorted(range(m), key=lambda i: (-group[i], i))[:n]
        )
    assert int((~mask).sum()) == rows * groups * (m - n)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_of_scores(dtype: torch.dtype):
    scores = scores_of(7, 24, 5, 0).to(dtype)
    assert torch.equal(Share(0.6).mask(scores), Share(0.6).mask(scores.float()))
    assert torch.equal(NM(1, 3).mask(scores), NM(1, 3).mask(scores.float()))


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.9, 0.9999])
def test_the_threshold_of_a_large_matrix_is_exact(fraction: float):
    spread = torch.randn(320, 311, generator=torch.Generator().manual_seed(0))
    for scores in (spread, spread.mul(3).round(), spread.abs().sort().values):
        kept, zeros = Share(fraction).mask(scores), round(fraction * scores.numel())
        expected = torch.zeros(scores.numel(), dtype=torch.bool)
        expected[
            scores.flatten().argsort(descending=True, stable=True)[
                : scores.numel() - zeros
            ]
        ] = True
        assert torch.equal(kept.flatten(), expected)


def test_the_strictest_patterns_of_four_and_eight():
    """A pattern that follows from another one is not named."""
    rows = {
        "11100000": "3:8",
        "11111000": "5:8",
        "11000101": "2:4",
        "11000100": "3:8, 2:4",
        "10000001": "1:4",
    }
    rows |= {
        "10000000": "1:8",
        "11111111": "",
        "111001111000": "3:4",
        "100": "",
        "00000000": "1:8",
    }
    for row, expected in rows.items():
        weight = torch.tensor([[float(digit) for digit in row]] * 2)
        assert strictest([most_kept(weight)]) == (expected or None), row
        for pattern in expected.split(", ") if expected else ():
            assert violations(parse_pattern(pattern), weight) == 0


def test_the_patterns_of_several_weights():
    """By the most weights that each keeps in any four and in any eight."""
    assert strictest([(3, 3), (4, 5)]) == "5:8"
    assert strictest([(3, 3), (2, 4)]) == "4:8, 3:4"
    assert strictest([(2, 3), (1, 2)]) == "3:8, 2:4"
    assert strictest([(2, 4), (4, 8)]) is None


def test_a_text_is_a_pattern_or_refused():
    for text, expected in (
        ("2:4", NM(2, 4)),
        (" 1 : 4 ", NM(1, 4)),
        ("16:32", NM(16, 32)),
    ):
        assert parse_pattern(text) == parse_pattern(str(expected)) == expected
    for text in ("2:3:4", "4:2", "0:4", "4:4", "a:b", "", "2", ":4", "-1:4", "2.0:4"):
        with pytest.raises(RecipeError, match="pattern is"):
            parse_pattern(text)


def test_a_weight_that_does_not_fit_is_named():
    with pytest.raises(RecipeError, match="12 weights"):
        Unstructured(6, 12).mask(torch.rand(3, 5))
    with pytest.raises(RecipeError, match=r"o_proj has 6 inputs.*2:4"):
        NM(2, 4).validate((8, 6), "o_proj")
    with pytest.raises(RecipeError, match="6 inputs"):
        NM(2, 4).mask(torch.rand(8, 6))
    NM(2, 4).validate((3, 8), "o_proj")


@pytest.mark.parametrize("pattern", [Share(0.5), NM(2, 4)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite(pattern: Pattern, value: float):
    scores = torch.rand(4, 8)
    scores[2, 3] = value
    with pytest.raises(NumericalError, match="1 of 32"):
        pattern.mask(scores)


def test_finite_scores_whose_sum_overflows_are_fine():
    assert int(Share(0.5).mask(torch.full((4, 4), 3e38)).sum()) == 8


@given(st.integers(0, 10**6), st.lists(st.integers(1, 50), min_size=1, max_size=9))
def test_shares_add_up(total: int, lengths: list[int]):
    ends = [0, *itertools.accumulate(lengths)]
    parts = [
        even_part(total, start, stop, ends[-1])
        for start, stop in itertools.pairwise(ends)
    ]
    assert sum(parts) == total
    assert all(
        abs(part - total * length / ends[-1]) < 1
        for part, length in zip(parts, lengths, strict=True)
    )
