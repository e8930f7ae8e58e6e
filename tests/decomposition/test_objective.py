import pytest
import torch

from sparsellm.chain.units import gelu
from sparsellm.decomposition.objective import (
    Chunk,
    Coefficients,
    FeedForward,
    Linear,
    Variables,
    default_coefficients,
    objective,
)
from tests.decomposition.helpers import random_unit


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_objective_is_the_formula_and_chunks_add_up(gated: bool, weighted: bool) -> None:
    unit = random_unit(4, 6, gated=gated, bias=True, activation=gelu)
    x, y = torch.randn(2, 11, 4, generator=torch.Generator().manual_seed(0))
    up, gate, a = torch.randn(3, 11, 6, generator=torch.Generator().manual_seed(1))
    w = torch.rand(11, generator=torch.Generator().manual_seed(2)) if weighted else None
    price = Coefficients(alpha=0.5, beta=2.0, gamma=3.0)
    root = 1.0 if w is None else w.sqrt()[:, None]
    made = gelu(gate) * up if gated else gelu(up)
    expected = 0.5 * ((up - x @ unit.up.weight.T - unit.up.bias) * root).square().sum()
    if unit.gate:
        expected += 0.5 * ((gate - x @ unit.gate.weight.T - unit.gate.bias) * root).square().sum()
    expected += 3.0 * ((a - made) * root).square().sum()
    expected += 2.0 * ((y - a @ unit.down.weight.T - unit.down.bias) * root).square().sum()
    total = 0.0
    for p in (slice(0, 4), slice(4, 5), slice(5, 11)):
        chunk, variables = Chunk(x[p], y[p], None if w is None else w[p]), Variables(up[p], gate[p] if gated else None)
        total += objective(unit, chunk, variables, a[p], price)
    assert total == pytest.approx(float(expected), rel=1e-5)


def test_default_coefficients_follow_the_scale_of_the_data() -> None:
    unit = random_unit(5, 8)
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(3))
    y = unit(x)
    base = default_coefficients(unit, x, y)
    louder = FeedForward(unit.up, Linear(unit.down.weight * 7), unit.activation)
    scaled = default_coefficients(louder, x, y * 7)  # the same problem in other units of the output
    assert scaled.beta == pytest.approx(base.beta / 49, rel=1e-4)
    assert (scaled.alpha, scaled.gamma) == pytest.approx((base.alpha, base.gamma), rel=1e-4)
    assert min(default_coefficients(unit, x * 0, y * 0)) >= 0
