"""The objective and each update against truth without them: dense grids, autograd in fp64, explicit inverses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsellm.method.auxiliary import updates
from sparsellm.method.auxiliary.objective import (
    Chunk,
    Coefficients,
    Linear,
    Variables,
    default_coefficients,
    objective,
)
from sparsellm.method.auxiliary.updates import (
    Moments,
    MomentsAccumulator,
    pseudo_inverse_weight,
)
from sparsellm.method.gram import least_squares
from sparsellm.model.units import gelu
from tests.method.auxiliary.helpers import random_unit


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_objective_is_the_formula_and_chunks_add_up(
    gated: bool, weighted: bool
) -> None:
    unit = random_unit(4, 6, gated=gated, bias=True, activation=gelu)
    x, y = torch.randn(2, 11, 4, generator=torch.Generator().manual_seed(0))
    up, gate, a = torch.randn(3, 11, 6, generator=torch.Generator().manual_seed(1))
    w = torch.rand(11, generator=torch.Generator().manual_seed(2)) if weighted else None
    price = Coefficients(alpha=0.5, beta=2.0, gamma=3.0)
    root = 1.0 if w is None else w.sqrt()[:, None]
    made = gelu(gate) * up if gated else gelu(up)
    expected = 0.5 * ((up - x @ unit.up.weight.T - unit.up.bias) * root).square().sum()
    if unit.gate:
        expected += (
            0.5
            * ((gate - x @ unit.gate.weight.T - unit.gate.bias) * root).square().sum()
        )
    expected += 3.0 * ((a - made) * root).square().sum()
    expected += (
        2.0 * ((y - a @ unit.down.weight.T - unit.down.bias) * root).square().sum()
    )
    total = 0.0
    for p in (slice(0, 4), slice(4, 5), slice(5, 11)):
        chunk, variables = (
            Chunk(x[p], y[p], None if w is None else w[p]),
            Variables(up[p], gate[p] if gated else None),
        )
        total += objective(unit, chunk, variables, a[p], price)
    assert total == pytest.approx(float(expected), rel=1e-5)


def test_default_coefficients_follow_the_scale_of_the_data() -> None:
    unit = random_unit(5, 8)
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(3))
    y = unit(x)
    base = default_coefficients(unit, x, y)
    louder = type(unit)(unit.up, Linear(unit.down.weight * 7), unit.activation)
    # the same problem in other units of the output
    scaled = default_coefficients(louder, x, y * 7)
    assert scaled.beta == pytest.approx(base.beta / 49, rel=1e-4)
    assert (scaled.alpha, scaled.gamma) == pytest.approx(
        (base.alpha, base.gamma), rel=1e-4
    )
    assert min(default_coefficients(unit, x * 0, y * 0)) >= 0


# first the paper's
PRICES = [
    Coefficients(1.0, 1.0, 1.0),
    Coefficients(0.3, 1.0, 5.0),
    Coefficients(4.0, 1.0, 0.2),
]


def _draw(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, a, z, u = torch.randn(4, count, generator=torch.Generator().manual_seed(seed))
    return 1.5 * m - 0.3, a, z, u


def _cost(z: Tensor, m: Tensor, a: Tensor, prices: Coefficients) -> Tensor:
    z, m, a = z.double(), m.double(), a.double()
    return prices.alpha * (z - m) ** 2 + prices.gamma * (a - z.relu()) ** 2


@pytest.mark.parametrize("prices", PRICES, ids=str)
def test_solution_by_cases_is_the_global_minimum(prices: Coefficients) -> None:
    m, a, _, _ = _draw(400, 3)
    result = updates.update_preactivation(m, a, prices)
    grid = torch.linspace(-12, 12, 9601, dtype=torch.float64)  # tight to about 1e-5
    best = _cost(grid, m[:, None], a[:, None], prices).amin(dim=1)
    assert (_cost(result, m, a, prices) - best).max() < 1e-5 * (1 + float(best.max()))


def test_linear_branch_has_no_gradient_left() -> None:
    m, a, _, gate = (t.double() for t in _draw(500, 4))
    u = updates.update_linear_gate_branch(
        m, a, gate, Coefficients(0.7, 1.0, 3.0)
    ).requires_grad_(True)
    (0.7 * (u - m) ** 2 + 3.0 * (a - gate * u) ** 2).sum().backward()
    assert u.grad is not None
    assert u.grad.abs().max() < 1e-12


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 9)),
    prices=st.tuples(*[st.floats(1e-3, 1e3)] * 3),
    bias=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_no_update_raises_the_objective(shape, prices, bias, seed) -> None:  # type: ignore[no-untyped-def]
    tokens, d, f = shape
    unit = random_unit(d, f, bias=bias, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x, y = torch.randn(2, tokens, d, generator=generator) * 3
    up, a = torch.randn(2, tokens, f, generator=generator) * 2
    price, chunk, variables = Coefficients(*prices), Chunk(x, y), Variables(up)
    values = [objective(unit, chunk, variables, a, price)]
    gain = updates.activation_gain(unit.down.weight, price)
    a = updates.update_activation(
        variables.activated(unit.activation), y, unit.down, gain
    )
    values.append(objective(unit, chunk, variables, a, price))
    variables = updates.move_variables(unit, unit.products(x), variables, a, price)
    values.append(objective(unit, chunk, variables, a, price))
    assert values[2] <= values[1] * (1 + 1e-4) <= values[0] * (1 + 3e-4)


def _data(
    tokens: int, inputs: int, outputs: int, mean: float = 0.0, weighted: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(tokens + inputs)
    x = torch.randn(tokens, inputs, generator=generator) + mean
    target = torch.randn(tokens, outputs, generator=generator) + x @ torch.randn(
        inputs, outputs, generator=generator
    )
    return (
        x,
        target,
        torch.rand(tokens, generator=generator) + 0.05 if weighted else None,
    )


def _moments(
    linear: Linear, x: Tensor, t: Tensor, w: Tensor | None, chunk: int
) -> Moments:
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
    fitted = moments.linear(
        least_squares(moments.gram, moments.cross, 1e-9, linear.weight).weight
    )
    rows = torch.cat([x, torch.ones(300, 1)], dim=1).double() if bias else x.double()
    root = (torch.ones(300) if w is None else w).double().sqrt()[:, None]
    expected = torch.linalg.pinv(rows * root) @ (t.double() * root)  # (in [+ 1], out)
    torch.testing.assert_close(
        fitted.weight.double(), expected[:12].T, rtol=1e-3, atol=1e-4
    )
    if bias:
        torch.testing.assert_close(
            fitted.bias.double(), expected[12], rtol=1e-3, atol=1e-3
        )


def test_centring_keeps_the_digits_of_a_massive_mean() -> None:
    x, t, _ = _data(400, 6, 3)
    x[:, 2] += (
        3000.0  # fp32 moments about zero would lose this feature's variance of one in 9·10⁶
    )
    moments = _moments(Linear(torch.zeros(3, 6), torch.zeros(3)), x, t, None, chunk=50)
    torch.testing.assert_close(
        moments.gram.matrix.double(),
        x.double().T.cov(correction=0),
        rtol=1e-2,
        atol=1e-2,
    )


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
