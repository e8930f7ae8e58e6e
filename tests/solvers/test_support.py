"""Least squares on a support against the normal equation of each row."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparsellm.solvers.support import refine_on_support
from sparsellm.statistics import Gram
from tests.solvers.problems import best_on, gram_of, loss, losses, weight_of


def wide(gram: Gram) -> Gram:
    return Gram(gram.matrix.double(), gram.tokens)


def random_mask(out: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(out, inputs, generator=torch.Generator().manual_seed(seed)) > 0.6


def test_reaches_the_normal_equation():
    weight, gram, mask = weight_of(9, 20), gram_of(20), random_mask(9, 20)
    result = refine_on_support(weight.double(), wide(gram), mask, weight.double(), 200)
    torch.testing.assert_close(result.weight, best_on(mask, weight, gram), rtol=1e-5, atol=1e-7)


def test_the_ridge_is_that_of_the_inputs_own_squares():
    weight, gram, mask = weight_of(5, 16), gram_of(16), random_mask(5, 16)
    ridged = Gram(gram.matrix + 0.3 * torch.diag(gram.matrix.diagonal()), gram.tokens)
    result = refine_on_support(weight.double(), wide(gram), mask, weight.double(), 200, damping=0.3)
    torch.testing.assert_close(result.weight, best_on(mask, weight, ridged), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(result.objective, loss(result.weight, weight, ridged), rtol=1e-6, atol=0)


def test_every_step_lowers_the_loss_of_every_row():
    weight, gram, mask = weight_of(9, 60), gram_of(60), random_mask(9, 60)
    results = [refine_on_support(weight, gram, mask, weight, iterations) for iterations in range(12)]
    by_row = [losses(result.weight, weight, gram) for result in results]
    for result, rows in zip(results, by_row, strict=True):
        assert result.objective == pytest.approx(float(rows.sum()), rel=1e-3)
    assert all((after <= before * (1 + 1e-5)).all() for before, after in itertools.pairwise(by_row))


def test_stays_at_the_minimum_and_at_what_no_token_excites():
    weight, mask = weight_of(4, 30), random_mask(4, 30)
    gram = gram_of(30, tokens=5)  # 25 directions that no token excites
    best = refine_on_support(weight, gram, mask, weight, 30).weight
    again = refine_on_support(weight, gram, mask, best, 50).weight
    assert torch.isfinite(again).all()
    assert loss(again, weight, gram) <= 1e-4 * loss(torch.where(mask, weight, 0.0), weight, gram)
    assert (again - best).norm() < 1e-2 * best.norm()


def test_rows_with_nothing_or_everything_kept():
    weight, gram = weight_of(2, 8), gram_of(8)
    mask = torch.tensor([[False] * 8, [True] * 8])
    result = refine_on_support(weight, gram, mask, torch.zeros_like(weight), 60)
    assert result.weight[0].count_nonzero() == 0
    torch.testing.assert_close(result.weight[1], weight[1], rtol=1e-2, atol=1e-3)
