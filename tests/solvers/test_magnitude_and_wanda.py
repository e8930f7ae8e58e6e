"""Both keep weights as they are: brute force over every mask finds none that keeps more of their criterion."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparsellm.patterns import NM, Pattern
from sparsellm.solvers import SOLVERS
from tests.shares import Share, violations, zeros_of
from tests.solvers.problems import gram_of, weight_of


def masks(pattern: Pattern) -> list[torch.Tensor]:
    every = (torch.tensor(kept).reshape(3, 4) for kept in itertools.product([False, True], repeat=12))
    right = (mask for mask in every if int((~mask).sum()) == zeros_of(pattern, (3, 4)))
    return [mask for mask in right if not isinstance(pattern, NM) or violations(pattern, mask.float()) == 0]


@pytest.mark.parametrize("pattern", [Share(0.4), Share(0.75), NM(2, 4)], ids=str)
def test_magnitude_keeps_the_largest_sum_of_any_mask(pattern: Pattern):
    weight = weight_of(3, 4)
    result = SOLVERS["magnitude"].function(weight, gram_of(4), pattern)
    best = max(masks(pattern), key=lambda mask: float(weight.abs()[mask].sum()))
    assert torch.equal(result.mask, best)
    assert torch.equal(result.weight, torch.where(best, weight, 0.0))


@pytest.mark.parametrize("pattern", [Share(0.5), Share(0.25), NM(1, 4)], ids=str)
def test_wanda_loses_the_least_of_any_mask_where_inputs_are_independent(pattern: Pattern):
    """Its criterion ``|w|² E x²`` is the loss itself then; each output gives the same number of weights."""
    weight, gram = weight_of(3, 4), gram_of(4)
    cost = weight.double().square() * gram.matrix.diagonal().double()
    fair = [mask for mask in masks(pattern) if len(mask.sum(dim=1).unique()) == 1]
    best = min(fair, key=lambda mask: float(cost[~mask].sum()))
    result = SOLVERS["wanda"].function(weight, gram, pattern)
    assert torch.equal(result.mask, best)
    assert torch.equal(result.weight, torch.where(best, weight, 0.0))


def test_wanda_spreads_what_rows_do_not_divide():
    result = SOLVERS["wanda"].function(weight_of(4, 5), gram_of(5), Share(0.5))  # 10 zeros over 4 rows
    assert sorted((~result.mask).sum(dim=1).tolist()) == [2, 2, 3, 3]
