"""Gram matrices against the textbook formula in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsellm.errors import NumericalError
from sparsellm.method import gram
from sparsellm.method.gram import (
    CrossAccumulator,
    Gram,
    GramAccumulator,
    least_squares,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_of(x: Tensor, weights: Tensor | None = None) -> Gram:
    accumulator = GramAccumulator(x.shape[-1])
    accumulator.update(x, weights)
    return accumulator.finish()


def cross_of(target: Tensor, x: Tensor, weights: Tensor | None = None) -> Tensor:
    accumulator = CrossAccumulator(target.shape[-1], x.shape[-1])
    accumulator.update(target, x, weights)
    return accumulator.finish()


def assert_close(actual: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    assert float((actual.double() - expected.double()).norm()) <= rtol * float(
        expected.double().norm()
    )


@pytest.mark.parametrize("features", [1, 7, 512, 700, 1100])
def test_equals_the_formula_over_panels_of_any_fit(features: int):
    x = normal(96, features)
    result = gram_of(x)
    assert_close(result.matrix, x.double().T @ x.double() / 96)
    assert torch.equal(result.matrix, result.matrix.T)
    assert result.tokens == 96
    assert result.matrix.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_low_precision_activations_are_summed_in_fp32(dtype: torch.dtype):
    x = normal(2, 50, 33).to(dtype) * 3
    assert_close(
        gram_of(x).matrix, torch.einsum("bti,btj->ij", x.double(), x.double()) / 100
    )


def test_streamed_equals_unstreamed(monkeypatch: pytest.MonkeyPatch):
    x, accumulator = normal(1000, 20), GramAccumulator(20)
    for part in x.split([1, 7, 500, 492]):
        accumulator.update(part)
        assert accumulator.finish().tokens == accumulator.tokens  # and it goes on
    assert_close(accumulator.finish().matrix, gram_of(x).matrix, 1e-6)
    monkeypatch.setattr(gram, "CHUNK_ELEMENTS", 1)  # the smallest chunk, 256 tokens
    assert_close(gram_of(x).matrix, x.double().T @ x.double() / 1000)


def test_token_weights():
    x, target, weights = (
        normal(3, 40, 12),
        normal(3, 40, 5, seed=2),
        normal(3, 40, seed=1).abs(),
    )
    expected = (
        torch.einsum("bt,bti,btj->ij", weights.double(), x.double(), x.double()) / 120
    )
    assert_close(gram_of(x, weights).matrix, expected)
    expected = (
        torch.einsum("bt,bto,bti->oi", weights.double(), target.double(), x.double())
        / 120
    )
    assert_close(cross_of(target, x, weights), expected)
    assert torch.equal(x, normal(3, 40, 12))  # inputs are not changed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_at_the_end(value: float):
    x = normal(50, 6)
    x[3, 2] = value
    with pytest.raises(NumericalError, match="Gram matrix of 6 inputs"):
        gram_of(x)
    with pytest.raises(NumericalError, match="cross moment"):
        cross_of(x, x)


def test_no_token_is_an_error():
    for empty in (GramAccumulator(3), CrossAccumulator(3, 3)):
        with pytest.raises(NumericalError, match="NaN"):
            empty.finish()


def test_energy_is_the_mean_square_of_the_output(monkeypatch: pytest.MonkeyPatch):
    x, weight, other = (
        normal(200, 600),
        normal(64, 600, seed=1),
        normal(64, 600, seed=2),
    )
    # nine times seven rows, and one
    monkeypatch.setattr(gram, "CHUNK_ELEMENTS", 600 * 7)
    for minus in (None, other):
        wide = weight.double() - (0 if minus is None else minus.double())
        expected = float((x.double() @ wide.T).square().sum() / 200)
        assert float(gram_of(x).energy(weight, minus)) == pytest.approx(
            expected, rel=1e-5
        )


def test_factors_are_of_the_damped_matrix():
    result = gram_of(normal(300, 40))
    damped = (
        result.matrix.double()
        + 0.1 * result.matrix.diagonal().double().mean() * torch.eye(40)
    )
    lower, inverse, upper = (
        result.cholesky(0.1),
        result.inverse(0.1),
        result.inverse_cholesky(0.1),
    )
    assert_close(lower.matrix @ lower.matrix.T, damped)
    assert_close(inverse.matrix, torch.linalg.inv(damped))
    assert_close(upper.matrix.T @ upper.matrix, torch.linalg.inv(damped))
    assert torch.equal(upper.matrix, upper.matrix.triu())
    assert lower.damping == inverse.damping == upper.damping == 0.1
    assert lower.notes == inverse.notes == upper.notes == ()


def test_factors_are_made_once_while_memory_lasts(monkeypatch: pytest.MonkeyPatch):
    result = gram_of(normal(100, 10))
    assert result.inverse(0.1) is result.inverse(0.1)
    assert result.inverse(0.1) is not result.inverse(0.2)
    monkeypatch.setattr(gram, "REMEMBERED_BYTES", 2 * 400)  # two of 10 x 10 in fp32
    small = gram_of(normal(100, 10))
    first = small.inverse_cholesky(0.1)
    small.inverse_cholesky(0.2)
    assert small.inverse_cholesky(0.1) is first
    small.inverse_cholesky(0.3)
    assert small.inverse_cholesky(0.1) is not first


def test_a_singular_gram_raises_its_damping_and_says_so():
    result = gram_of(normal(5, 40))  # rank 5
    for factor in (
        result.cholesky(0.0),
        result.inverse(0.0),
        result.inverse_cholesky(0.0),
    ):
        assert factor.damping > 0
        assert "damping raised from 0 to" in factor.notes[0]
        assert "40 inputs over 5 tokens" in factor.notes[0]
    factor = result.cholesky(0.0)
    damped = (
        result.matrix.double()
        + factor.damping * result.matrix.diagonal().double().mean() * torch.eye(40)
    )
    assert_close(factor.matrix @ factor.matrix.T, damped)


def test_damping_rises_tenfold_and_an_indefinite_matrix_fails():
    factor = gram_of(normal(50, 3).repeat(1, 2)).cholesky(1e-12)  # every input twice
    assert any(factor.damping == pytest.approx(10.0**power) for power in range(-11, -3))
    indefinite = torch.eye(4)
    indefinite[0, 1] = indefinite[1, 0] = 1e9
    with pytest.raises(NumericalError, match="any damping from 0"):
        Gram(indefinite, 1).cholesky(0.0)


def test_dead_inputs_are_cut_loose():
    x = normal(100, 6).index_fill_(1, torch.tensor(2), 0)
    result = gram_of(x)
    assert result.dead.tolist() == [False, False, True, False, False, False]
    live = [0, 1, 3, 4, 5]
    assert result.mean_diagonal == pytest.approx(
        float(x[:, live].double().square().mean()), rel=1e-5
    )
    sub = result.matrix[live][
        :, live
    ].double() + 0.01 * result.mean_diagonal * torch.eye(5)
    assert_close(result.inverse(0.01).matrix[live][:, live], torch.linalg.inv(sub))
    assert result.inverse(0.01).matrix[2].tolist() == [0, 0, 1, 0, 0, 0]
    assert_close(result.divided_by(result.scale).diagonal()[live], torch.ones(5))


def test_all_inputs_dead():
    assert torch.equal(gram_of(torch.zeros(10, 3)).inverse(0.01).matrix, torch.eye(3))


def test_least_squares_is_the_normal_equation():
    x, target = normal(300, 20), normal(300, 7, seed=1)
    fit = least_squares(gram_of(x), cross_of(target, x), 0.0, torch.zeros(7, 20))
    assert_close(
        fit.weight, torch.linalg.lstsq(x.double(), target.double()).solution.T, 1e-4
    )
    assert fit.notes == ()
    assert (
        "damping raised"
        in least_squares(
            gram_of(x[:5]), cross_of(x[:5], x[:5]), 0.0, torch.eye(20)
        ).notes[0]
    )


def test_least_squares_with_a_ridge_towards_a_prior():
    x, target, prior = (
        normal(30, 20).index_fill_(1, torch.tensor(4), 0),
        normal(30, 7, seed=1),
        normal(7, 20, seed=2),
    )
    result = gram_of(x)
    fit = least_squares(result, cross_of(target, x), damping=0.3, prior=prior)
    # the same problem with the ridge as more rows of data: √(Nλ) I with targets √(Nλ) priorᵀ
    root = (30 * 0.3 * result.mean_diagonal) ** 0.5
    rows = torch.cat([x.double(), root * torch.eye(20, dtype=torch.float64)])
    goal = torch.cat([target.double(), root * prior.double().T])
    assert_close(fit.weight, torch.linalg.lstsq(rows, goal).solution.T, 1e-4)
    assert torch.equal(fit.weight[:, 4], prior[:, 4])


@pytest.mark.parametrize("size", [1, 5, 64])
def test_triangles_are_inverted_by_halves(size: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gram, "TRIANGLE", 4)
    lower = normal(size, size).tril(-1) / size + torch.eye(size)
    inverse = lower.clone()
    gram.invert_lower_(inverse)
    assert_close(inverse @ lower, torch.eye(size))


@pytest.mark.parametrize("product", [gram._by_amx, gram._widening])
def test_half_precision_is_widened_where_a_product_can(
    product: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA alone has ``torch.mm`` into fp32: here fp32 factors stand in, for two panels twice and two cross-moments."""
    weights = torch.ones(40).index_fill_(0, torch.tensor([3, 30]), 0.3)
    x, y, seen = normal(40, 300).bfloat16(), normal(40, 20, seed=1).bfloat16(), []

    def moments() -> list[Tensor]:
        return [
            gram_of(x).matrix,
            gram_of(x, weights).matrix,
            cross_of(y, x),
            cross_of(y, x, weights),
        ]

    def mm(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
        seen.append((left.dtype, right.dtype, out_dtype))
        return left.float() @ right.float()

    monkeypatch.setattr(gram, "_product_for", lambda *_: gram._product)
    right = moments()
    monkeypatch.setattr(gram, "_product_for", lambda *_: product)
    monkeypatch.setattr(torch, "mm", mm)
    for moment, expected in zip(moments(), right, strict=True):
        assert_close(moment, expected, 1e-6)
    assert seen == [(torch.bfloat16, torch.bfloat16, torch.float32)] * 6 * (
        product is gram._widening
    )


def test_a_pivot_without_digits_raises_the_damping() -> None:
    """The second pivot is twice the rounding error of what it was computed from: positive, and of no meaning."""
    matrix = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2.0**-22]])
    factor = Gram(matrix, tokens=2).cholesky(0.0)
    assert factor.damping > 0
    assert "damping raised" in factor.notes[0]
