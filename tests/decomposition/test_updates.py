"""Each update against truth without it: dense grids, autograd in fp64, explicit inverses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsellm.decomposition import updates
from sparsellm.decomposition.objective import Chunk, Coefficients, Linear, Variables, objective
from tests.decomposition.helpers import random_unit

PRICES = [Coefficients(1.0, 1.0, 1.0), Coefficients(0.3, 1.0, 5.0), Coefficients(4.0, 1.0, 0.2)]  # first the paper's


def _draw(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    m, a, z, u = torch.randn(4, count, generator=generator)
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
    u = updates.update_linear_gate_branch(m, a, gate, Coefficients(0.7, 1.0, 3.0)).requires_grad_(True)
    (0.7 * (u - m) ** 2 + 3.0 * (a - gate * u) ** 2).sum().backward()
    assert u.grad is not None
    assert u.grad.abs().max() < 1e-12


@pytest.mark.parametrize(("tokens", "d", "f"), [(1, 3, 7), (5, 8, 3), (9, 4, 4), (2, 1, 6)])
@pytest.mark.parametrize("bias", [False, True])
def test_update_of_activations_is_the_explicit_inverse(tokens: int, d: int, f: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(f)
    weight, phi = torch.randn(d, f, generator=generator), torch.randn(tokens, f, generator=generator)
    y, b = torch.randn(tokens, d, generator=generator), torch.randn(d, generator=generator) if bias else None
    beta, gamma = 0.8, 0.3
    wide, shift = weight.double(), 0 if b is None else b.double()
    inverse = torch.linalg.inv(gamma * torch.eye(f, dtype=torch.float64) + beta * wide.T @ wide)
    expected = (gamma * phi.double() + beta * (y.double() - shift) @ wide) @ inverse
    gain = updates.activation_gain(weight, Coefficients(1.0, beta, gamma))
    result = updates.update_activation(phi, y, Linear(weight, b), gain)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)


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
    a = updates.update_activation(variables.activated(unit.activation), y, unit.down, gain)
    values.append(objective(unit, chunk, variables, a, price))
    variables = updates.move_variables(unit, unit.products(x), variables, a, price)
    values.append(objective(unit, chunk, variables, a, price))
    assert values[2] <= values[1] * (1 + 1e-4) <= values[0] * (1 + 3e-4)


def test_extreme_values_stay_finite_and_never_get_worse() -> None:
    values = torch.tensor([-1e6, -1e3, -1.0, 0.0, 1e-20, 1.0, 1e3, 1e6])
    m, a, z = (t.reshape(-1) for t in torch.meshgrid(*[values] * 3, indexing="ij"))
    prices = Coefficients(1.0, 1.0, 10.0)
    result = updates.update_preactivation(m, a, prices)
    assert torch.isfinite(result).all()
    rounding = 1e-12 * (m.double() ** 2 + a.double() ** 2)
    assert (_cost(result, m, a, prices) <= _cost(z, m, a, prices) * (1 + 1e-6) + rounding).all()
