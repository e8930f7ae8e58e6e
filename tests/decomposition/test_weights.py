import pytest
import torch
from torch import Tensor

from sparsellm.decomposition.objective import Linear
from sparsellm.decomposition.updates import Moments, MomentsAccumulator, pseudo_inverse_weight
from sparsellm.statistics import least_squares


def _data(
    tokens: int, inputs: int, outputs: int, mean: float = 0.0, weighted: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(tokens + inputs)
    x = torch.randn(tokens, inputs, generator=generator) + mean
    target = torch.randn(tokens, outputs, generator=generator) + x @ torch.randn(inputs, outputs, generator=generator)
    return x, target, torch.rand(tokens, generator=generator) + 0.05 if weighted else None


def _moments(linear: Linear, x: Tensor, t: Tensor, w: Tensor | None, chunk: int) -> Moments:
    accumulator = MomentsAccumulator(linear)
    for start in range(0, len(x), chunk):
        part = slice(start, start + chunk)
        accumulator.update(x[part], t[part], None if w is None else w[part])
    return accumulator.finish()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_weight_from_moments_is_the_pseudo_inverses(weighted: bool, bias: bool) -> None:
    x, t, w = _data(300, 12, 5, mean=2.0, weighted=weighted)
    linear = Linear(torch.zeros(5, 12), torch.zeros(5) if bias else None)
    moments = _moments(linear, x, t, w, chunk=64)
    fitted = moments.linear(least_squares(moments.gram, moments.cross, 1e-9, linear.weight).weight)

    rows = torch.cat([x, torch.ones(300, 1)], dim=1).double() if bias else x.double()
    root = (torch.ones(300) if w is None else w).double().sqrt()[:, None]
    expected = torch.linalg.pinv(rows * root) @ (t.double() * root)  # (in [+ 1], out)
    torch.testing.assert_close(fitted.weight.double(), expected[:12].T, rtol=1e-3, atol=1e-4)
    if bias:
        torch.testing.assert_close(fitted.bias.double(), expected[12], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bias", [False, True])
def test_streamed_moments_are_those_of_one_chunk(bias: bool) -> None:
    x, t, w = _data(200, 9, 4, mean=5.0, weighted=True)
    linear = Linear(torch.zeros(4, 9), torch.zeros(4) if bias else None)
    one, many = _moments(linear, x, t, w, 200), _moments(linear, x, t, w, 13)
    torch.testing.assert_close(one.gram.matrix, many.gram.matrix, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.cross, many.cross, rtol=1e-4, atol=1e-4)


def test_centring_keeps_the_digits_of_a_massive_mean() -> None:
    x, t, _ = _data(400, 6, 3)
    x[:, 2] += 3000.0  # fp32 moments about zero would lose this feature's variance of one in 9·10⁶
    linear = Linear(torch.zeros(3, 6), torch.zeros(3))
    moments = _moments(linear, x, t, None, chunk=50)
    expected = x.double().T.cov(correction=0)
    torch.testing.assert_close(moments.gram.matrix.double(), expected, rtol=1e-2, atol=1e-2)


def test_a_target_that_the_reference_makes_gives_the_reference_back() -> None:
    x, _, _ = _data(50, 8, 3)
    x[:, 0] *= 1000
    reference = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    moments = _moments(Linear(reference), x, x @ reference.T, None, chunk=20)
    fit = least_squares(moments.gram, moments.cross, 0.01, prior=reference)
    torch.testing.assert_close(fit.weight, reference, rtol=1e-4, atol=1e-4)


def test_a_pseudo_inverse_leaves_the_bias_alone() -> None:
    """Also where inputs depend on each other: then it is the least weight of all that fit best."""
    x, t, _ = _data(60, 12, 5)
    x[:, 7] = 2 * x[:, 3]
    linear = Linear(torch.zeros(5, 12), torch.arange(5.0))
    accumulator = MomentsAccumulator(linear, fit_bias=False, exact=True)
    for part in (slice(0, 25), slice(25, 60)):
        accumulator.update(x[part], t[part])
    moments = accumulator.finish()
    result = moments.linear(pseudo_inverse_weight(moments).weight)
    assert torch.equal(result.bias, linear.bias)
    expected = torch.linalg.pinv(x.double(), rtol=1e-6) @ (t - linear.bias).double()
    torch.testing.assert_close(result.weight.double(), expected.T, rtol=1e-4, atol=1e-5)
