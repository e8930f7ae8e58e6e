"""ADMM against brute force over all masks, and against what it starts from."""

from __future__ import annotations

import math

import pytest
import torch

from sparsellm.patterns import NM, Pattern, Unstructured
from sparsellm.solvers import SOLVERS
from sparsellm.statistics import Gram
from tests.solvers.problems import best_on, gram_of, loss, relative, true_best, weight_of

admm = SOLVERS["admm"].function


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NM(2, 4)], ids=str)
def test_near_the_true_best(pattern: Pattern):
    """On the problems on which SparseGPT, as its own test says, loses up to 25 times as much as the best mask."""
    ratios = []
    for seed in range(6):
        weight, gram = weight_of(2, 8, seed), gram_of(8, seed=seed)
        found = admm(weight, gram, pattern, damping=0.0, refine_iterations=30)
        ratios.append(relative(found.weight, weight, gram) / true_best(weight, gram, pattern))
    assert min(ratios) >= 1 - 1e-4
    assert math.prod(ratios) ** (1 / len(ratios)) < 1.7
    assert max(ratios) < 4.5


def test_finds_the_true_best_where_inputs_are_independent():
    """Then weights do not interact, and the best mask is that of ``w² E x²``."""
    weight, squares = weight_of(5, 12), torch.rand(12, generator=torch.Generator().manual_seed(1)) + 0.1
    found = admm(weight, Gram(torch.diag(squares), 100), Unstructured(0.5))
    cost = (weight.square() * squares).flatten()
    expected = torch.zeros(60, dtype=torch.bool)
    expected[cost.argsort(descending=True)[:30]] = True
    assert torch.equal(found.mask.flatten(), expected)
    torch.testing.assert_close(found.weight, torch.where(found.mask, weight, 0.0))


@pytest.mark.parametrize("scope", ["matrix", "row"])
@pytest.mark.parametrize("tokens", [6, 40, 400])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.9), NM(2, 4)], ids=str)
def test_never_worse_than_the_projected_and_refined_start(pattern: Pattern, tokens: int, scope: str):
    for seed in range(4):
        weight, gram = weight_of(8, 32, seed), gram_of(32, tokens, seed)
        options = {"scope": scope, "damping": 0.0, "refine_iterations": 20}
        start = admm(weight, gram, pattern, iterations=0, **options)
        found = admm(weight, gram, pattern, **options)
        assert found.error <= start.error * (1 + 1e-4) + 1e-6


def test_the_kept_weights_are_refined():
    weight, gram = weight_of(12, 48), gram_of(48, 500)
    found = admm(weight, gram, Unstructured(0.6), damping=0.0, refine_iterations=100)
    assert loss(found.weight, weight, gram) <= 1.01 * loss(best_on(found.mask, weight, gram), weight, gram)


def test_eight_refinements_are_near_the_minimum():
    weight, gram = weight_of(64, 256), gram_of(256, 4000)
    short, long = (admm(weight, gram, Unstructured(0.7), refine_iterations=n).error for n in (8, 100))
    assert long <= short <= 1.05 * long


def test_the_row_scope_takes_as_many_from_each_row():
    found = admm(weight_of(8, 30), gram_of(30), Unstructured(0.5), scope="row")
    assert found.mask.sum(dim=1).tolist() == [15] * 8


def test_linears_of_one_input_share_the_factorisations(monkeypatch: pytest.MonkeyPatch):
    made = []
    invert = Gram._invert
    monkeypatch.setattr(Gram, "_invert", lambda gram, damping: made.append(damping) or invert(gram, damping))
    gram = gram_of(32)
    for seed in range(3):  # q, k, v
        admm(weight_of(8, 32, seed), gram, Unstructured(0.5))
    assert len(made) == 6  # one of the metric and one for each of five ρ


def test_a_ridge_keeps_weights_of_a_singular_gram_in_bounds():
    weight, gram = weight_of(8, 60), gram_of(60, tokens=4)
    found = admm(weight, gram, Unstructured(0.5))
    assert found.notes == ()
    assert found.weight.abs().max() < 20 * weight.abs().max()
