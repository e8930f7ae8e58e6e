"""ADMM against what it starts from, and its least squares on a support against the normal equation of each row."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparsellm.method.gram import Gram
from sparsellm.method.solvers import SOLVERS
from sparsellm.method.solvers.prepared import prepared
from sparsellm.method.solvers.support import refine_on_support
from sparsellm.model.products import Bf16Products
from sparsellm.patterns import NM, Pattern
from tests.method.solvers.problems import (
    best_on,
    gram_of,
    loss,
    losses,
    relative,
    weight_of,
)
from tests.shares import Share

admm = SOLVERS["admm"].function


def test_finds_the_true_best_where_inputs_are_independent():
    """Then weights do not interact, and the best mask is that of ``w² E x²``."""
    weight, squares = (
        weight_of(5, 12),
        torch.rand(12, generator=torch.Generator().manual_seed(1)) + 0.1,
    )
    result = admm(weight, Gram(torch.diag(squares), 100), Share(0.5))
    expected = torch.zeros(60, dtype=torch.bool)
    expected[(weight.square() * squares).flatten().argsort(descending=True)[:30]] = True
    assert torch.equal(result.mask.flatten(), expected)
    torch.testing.assert_close(result.weight, torch.where(result.mask, weight, 0.0))


def test_the_kept_weights_are_refined():
    weight, gram = weight_of(12, 48), gram_of(48, 500)
    result = admm(weight, gram, Share(0.6), damping=0.0, refine_iterations=100)
    assert loss(result.weight, weight, gram) <= 1.01 * loss(
        best_on(result.mask, weight, gram), weight, gram
    )
    default = admm(weight, gram, Share(0.6)).error  # near the minimum
    assert default <= 1.05 * admm(weight, gram, Share(0.6), refine_iterations=100).error


def test_inputs_that_are_always_zero_change_nothing_for_others():
    weight, gram = weight_of(8, 24), gram_of(24, 200)
    matrix = torch.zeros(96, 96)
    matrix[:24, :24] = gram.matrix
    wide = admm(
        torch.cat((weight, weight_of(8, 72, 1)), dim=1),
        Gram(matrix, 200),
        Share((8 * 72 + 96) / (8 * 96)),
    )
    alone = admm(weight, gram, Share(0.5))
    assert torch.equal(wide.mask[:, :24], alone.mask)
    torch.testing.assert_close(wide.weight[:, :24], alone.weight)


@pytest.mark.parametrize("pattern", [Share(0.7), NM(2, 4)], ids=str)
def test_weights_of_inputs_that_are_nearly_zero_stay_small(pattern: Pattern):
    """They could take over from the others, a thousand times as large."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2000, 32, generator=generator), weight_of(16, 32)
    x[:, :8] = 1e-3 * (
        x[:, 8:] @ torch.randn(24, 8, generator=generator) / 24**0.5 + 0.3 * x[:, :8]
    )
    assert float(
        admm(weight, Gram(x.T @ x / 2000, 2000), pattern).weight.abs().max()
    ) < 2 * float(weight.abs().max())


def test_a_ridge_keeps_weights_of_a_singular_gram_in_bounds():
    weight, gram = weight_of(8, 60), gram_of(60, tokens=4)
    result = admm(weight, gram, Share(0.5))
    assert result.notes == ()
    assert result.weight.abs().max() < 20 * weight.abs().max()


def test_a_first_mask_that_is_better_is_found_and_kept(monkeypatch: pytest.MonkeyPatch):
    """With few tokens the alternation may end worse than it began; then the result is that of the start, refined."""
    monkeypatch.setattr("sparsellm.method.solvers.admm.RHO", (30.0, 30.0))
    kept_the_first = 0
    for seed in range(8):
        weight, gram = weight_of(8, 32, seed), gram_of(32, 6, seed)
        start = admm(weight, gram, Share(0.5), iterations=0, damping=0.0)
        result = admm(weight, gram, Share(0.5), iterations=1, damping=0.0)
        kept_the_first += torch.equal(result.mask, start.mask)
        assert result.error <= start.error * (1 + 1e-3) + 1e-6
    assert kept_the_first


def test_rounded_products_change_mask_and_error_little():
    weight, gram = weight_of(64, 256), gram_of(256, 4000)
    products = Bf16Products()
    exact, rounded, plain = (
        prepared(SOLVERS["admm"], mode)(weight, gram, Share(0.7))
        for mode in (None, products, None)
    )
    assert torch.equal(exact.weight, plain.weight)
    assert not torch.equal(exact.weight, rounded.weight)  # products were rounded
    assert float((exact.mask != rounded.mask).float().mean()) < 0.02
    assert abs(rounded.error / exact.error - 1) < 0.01
    unasked = [
        prepared(SOLVERS["sparsegpt"], given)(weight, gram, Share(0.7)).weight
        for given in (None, products)
    ]
    assert torch.equal(*unasked)  # a solver that does not ask for it is never rounded


def test_costs_of_outputs_decide_which_weights_stay():
    weight, gram, costs = (
        weight_of(8, 32),
        gram_of(32),
        torch.tensor([4.0] * 4 + [0.25] * 4),
    )
    plain, result = (
        prepared(SOLVERS["sparsegpt"], None, given)(weight, gram, Share(0.5))
        for given in (None, costs)
    )
    assert int(result.mask.sum()) == int(plain.mask.sum())
    assert int(result.mask[:4].sum()) > int(plain.mask[:4].sum())
    assert result.error == pytest.approx(
        relative(result.weight, weight, gram), rel=1e-3
    )
    equal = prepared(SOLVERS["sparsegpt"], None, torch.full((8,), 4.0))(
        weight, gram, Share(0.5)
    )
    assert torch.equal(equal.weight, plain.weight)


def wide(gram: Gram) -> Gram:
    return Gram(gram.matrix.double(), gram.tokens)


def random_mask(out: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(out, inputs, generator=torch.Generator().manual_seed(seed)) > 0.6


def test_reaches_the_normal_equation_with_each_inputs_own_ridge():
    weight, gram, mask = weight_of(9, 20), gram_of(20), random_mask(9, 20)
    result = refine_on_support(weight.double(), wide(gram), mask, weight.double(), 200)
    torch.testing.assert_close(
        result.weight, best_on(mask, weight, gram), rtol=1e-5, atol=1e-7
    )
    weight, gram, mask = weight_of(5, 16), gram_of(16), random_mask(5, 16)
    ridged = Gram(gram.matrix + 0.3 * torch.diag(gram.matrix.diagonal()), gram.tokens)
    result = refine_on_support(
        weight.double(), wide(gram), mask, weight.double(), 200, damping=0.3
    )
    torch.testing.assert_close(
        result.weight, best_on(mask, weight, ridged), rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(
        result.objective, loss(result.weight, weight, ridged), rtol=1e-6, atol=0
    )


def test_every_step_lowers_the_loss_of_every_row():
    weight, gram, mask = weight_of(9, 60), gram_of(60), random_mask(9, 60)
    results = [
        refine_on_support(weight, gram, mask, weight, iterations)
        for iterations in range(12)
    ]
    by_row = [losses(result.weight, weight, gram) for result in results]
    for result, rows in zip(results, by_row, strict=True):
        assert result.objective == pytest.approx(float(rows.sum()), rel=1e-3)
    assert all(
        (after <= before * (1 + 1e-5)).all()
        for before, after in itertools.pairwise(by_row)
    )


def test_no_row_ends_worse_than_it_began() -> None:
    """Not even by rounded products: with few tokens for many inputs, their steps lead far away."""
    weight = weight_of(16, 256)
    gram = gram_of(256, tokens=20)
    mask = random_mask(16, 256)
    with Bf16Products():
        result = refine_on_support(weight, gram, mask, weight, iterations=50)
    began = losses(torch.where(mask, weight, 0.0), weight, gram)
    assert bool((losses(result.weight, weight, gram) <= 1.001 * began).all())


def test_stays_at_the_minimum_and_at_what_no_token_excites():
    weight, mask = weight_of(4, 30), random_mask(4, 30)
    gram = gram_of(30, tokens=5)  # 25 directions that no token excites
    best = refine_on_support(weight, gram, mask, weight, 30).weight
    again = refine_on_support(weight, gram, mask, best, 50).weight
    assert torch.isfinite(again).all()
    assert loss(again, weight, gram) <= 1e-4 * loss(
        torch.where(mask, weight, 0.0), weight, gram
    )
    assert (again - best).norm() < 1e-2 * best.norm()


def test_rows_with_nothing_or_everything_kept():
    weight, gram = weight_of(2, 8), gram_of(8)
    result = refine_on_support(
        weight,
        gram,
        torch.tensor([[False] * 8, [True] * 8]),
        torch.zeros_like(weight),
        60,
    )
    assert result.weight[0].count_nonzero() == 0
    torch.testing.assert_close(result.weight[1], weight[1], rtol=1e-2, atol=1e-3)


def test_a_large_ridge_keeps_the_dense_values():
    """With a ridge far above the curvature, what is kept is not moved to make up for what is pruned."""
    weight = weight_of(8, 32)
    gram = gram_of(32)
    result = admm(weight, gram, NM(2, 4), damping=1e4)
    kept = result.weight != 0
    assert int(kept.sum()) == 8 * 16
    assert torch.allclose(result.weight[kept], weight[kept], rtol=0.01)
