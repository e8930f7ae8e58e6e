"""ADMM against brute force over all masks, and against what it starts from."""

from __future__ import annotations

import math

import pytest
import torch

from sparsellm.chain.products import Bf16Products
from sparsellm.patterns import NM, Pattern
from sparsellm.solvers import SOLVERS
from sparsellm.solvers.admm import RHO_STEPS
from sparsellm.solvers.divided import divide
from sparsellm.statistics import Gram
from tests.shares import Share
from tests.solvers.problems import best_on, gram_of, loss, relative, true_best, weight_of

admm = SOLVERS["admm"].function


@pytest.mark.parametrize("pattern", [Share(0.5), Share(0.7), NM(2, 4)], ids=str)
def test_near_the_true_best(pattern: Pattern):
    """On the problems on which SparseGPT, as its own test says, loses up to 25 times as much as the best mask."""
    ratios = []
    for seed in range(6):
        weight, gram = weight_of(2, 8, seed), gram_of(8, seed=seed)
        result = admm(weight, gram, pattern, damping=0.0, refine_iterations=30)
        ratios.append(relative(result.weight, weight, gram) / true_best(weight, gram, pattern))
    assert min(ratios) >= 1 - 1e-4
    assert math.prod(ratios) ** (1 / len(ratios)) < 1.7
    assert max(ratios) < 4.5


def test_finds_the_true_best_where_inputs_are_independent():
    """Then weights do not interact, and the best mask is that of ``w² E x²``."""
    weight, squares = weight_of(5, 12), torch.rand(12, generator=torch.Generator().manual_seed(1)) + 0.1
    result = admm(weight, Gram(torch.diag(squares), 100), Share(0.5))
    cost = (weight.square() * squares).flatten()
    expected = torch.zeros(60, dtype=torch.bool)
    expected[cost.argsort(descending=True)[:30]] = True
    assert torch.equal(result.mask.flatten(), expected)
    torch.testing.assert_close(result.weight, torch.where(result.mask, weight, 0.0))


def test_the_kept_weights_are_refined():
    weight, gram = weight_of(12, 48), gram_of(48, 500)
    result = admm(weight, gram, Share(0.6), damping=0.0, refine_iterations=100)
    assert loss(result.weight, weight, gram) <= 1.01 * loss(best_on(result.mask, weight, gram), weight, gram)
    default = admm(weight, gram, Share(0.6)).error  # near the minimum
    assert default <= 1.05 * admm(weight, gram, Share(0.6), refine_iterations=100).error


def test_linears_of_one_input_share_the_factorisations(monkeypatch: pytest.MonkeyPatch):
    made = []
    factorise = Gram.cholesky
    monkeypatch.setattr(Gram, "cholesky", lambda gram, damping: made.append(damping) or factorise(gram, damping))
    gram = gram_of(32)
    for seed in range(3):  # q, k, v
        admm(weight_of(8, 32, seed), gram, Share(0.5))
    assert len(made) == 1 + RHO_STEPS  # one of the metric and one for each ρ


def test_a_ridge_keeps_weights_of_a_singular_gram_in_bounds():
    weight, gram = weight_of(8, 60), gram_of(60, tokens=4)
    result = admm(weight, gram, Share(0.5))
    assert result.notes == ()
    assert result.weight.abs().max() < 20 * weight.abs().max()


def test_a_first_mask_that_is_better_is_found_and_kept(monkeypatch: pytest.MonkeyPatch):
    """With few tokens the alternation may end worse than it began; then the result is that of the start, refined."""
    monkeypatch.setattr("sparsellm.solvers.admm.RHO", (30.0, 30.0))
    kept_the_first = 0
    for seed in range(8):
        weight, gram = weight_of(8, 32, seed), gram_of(32, 6, seed)
        start = admm(weight, gram, Share(0.5), iterations=0, damping=0.0)
        result = admm(weight, gram, Share(0.5), iterations=1, damping=0.0)
        kept_the_first += torch.equal(result.mask, start.mask)
        assert result.error <= start.error * (1 + 1e-3) + 1e-6
    assert kept_the_first


def test_rounded_products_change_the_mask_little_and_the_error_less():
    weight, gram = weight_of(64, 256), gram_of(256, 4000)
    products = Bf16Products()
    exact, rounded, plain = (
        divide(SOLVERS["admm"], given)(weight, gram, Share(0.7)) for given in (None, products, None)
    )
    assert torch.equal(exact.weight, plain.weight)
    assert not torch.equal(exact.weight, rounded.weight)  # products were rounded
    assert float((exact.mask != rounded.mask).float().mean()) < 0.02
    assert abs(rounded.error / exact.error - 1) < 0.01
    unasked = [divide(SOLVERS["sparsegpt"], given)(weight, gram, Share(0.7)).weight for given in (None, products)]
    assert torch.equal(*unasked)  # a solver that does not ask for it is never rounded


def test_costs_of_outputs_decide_which_weights_stay():
    weight, gram, costs = weight_of(8, 32), gram_of(32), torch.tensor([4.0] * 4 + [0.25] * 4)
    plain, result = (divide(SOLVERS["sparsegpt"], None, given)(weight, gram, Share(0.5)) for given in (None, costs))
    assert int(result.mask.sum()) == int(plain.mask.sum())
    assert int(result.mask[:4].sum()) > int(plain.mask[:4].sum())
    assert result.error == pytest.approx(relative(result.weight, weight, gram), rel=1e-3)
    equal = divide(SOLVERS["sparsegpt"], None, torch.full((8,), 4.0))(weight, gram, Share(0.5))
    assert torch.equal(equal.weight, plain.weight)
