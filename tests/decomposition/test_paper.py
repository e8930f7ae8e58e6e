import pytest
import torch

from sparsellm.decomposition.activations import gelu, relu, silu
from sparsellm.decomposition.objective import Coefficients
from sparsellm.decomposition.paper import prune_as_published
from sparsellm.errors import ModelError
from sparsellm.patterns import Unstructured
from tests.decomposition.helpers import by_input_norm, random_chunks, random_unit

HALF = Unstructured(0.5)


def test_first_epoch_is_local_pruning_of_the_dense_weights() -> None:
    unit = random_unit(6, 12, gated=False, bias=True, activation=relu)
    (chunk,) = random_chunks(unit, [80])
    result = prune_as_published(unit, chunk.inputs, by_input_norm, HALF, epochs=1)
    for role, linear in result.unit.linears().items():
        dense = unit.linears()[role]
        kept = linear.weight != 0
        assert torch.equal(linear.weight[kept], dense.weight[kept])
        assert torch.equal(linear.bias, dense.bias)


def test_second_epoch_follows_the_published_formulas() -> None:
    unit = random_unit(5, 7, gated=False, bias=True, activation=relu)
    (chunk,) = random_chunks(unit, [60])
    x, y = chunk.inputs.double(), unit(chunk.inputs).double()
    first = prune_as_published(unit, chunk.inputs, by_input_norm, HALF, epochs=1).unit
    second = prune_as_published(unit, chunk.inputs, by_input_norm, HALF, epochs=2).unit
    w1, w2, b1, b2 = (t.double() for t in (first.up.weight, first.down.weight, first.up.bias, first.down.bias))
    z = x @ unit.up.weight.double().T + b1
    p = (z.relu() * 0.1 + 0.1 * (y - b2) @ w2) @ torch.linalg.inv(0.1 * torch.eye(7).double() + 0.1 * w2.T @ w2)
    m = x @ w1.T + b1
    z1, z2 = ((p + m) / 2).clamp(min=0), m.clamp(max=0)
    cost1, cost2 = ((p - z.relu()).square() + (z - m).square() for z in (z1, z2))
    z = torch.where(cost1 <= cost2, z1, z2)
    wanted = {"up": (z - b1).T @ torch.linalg.pinv(x).T, "down": (y - b2).T @ torch.linalg.pinv(p).T}
    for role, target in wanted.items():
        found = second.linears()[role].weight
        kept = found != 0
        torch.testing.assert_close(found.double()[kept], target[kept], rtol=1e-2, atol=1e-2)


def test_gated_units_run_and_report_an_error_per_epoch() -> None:
    unit = random_unit(6, 12, gated=True, activation=silu)
    (chunk,) = random_chunks(unit, [80])
    result = prune_as_published(unit, chunk.inputs, by_input_norm, HALF, Coefficients(1.0, 1.0, 1.0, 1.0), epochs=3)
    assert len(result.errors) == 3
    assert all(HALF.violations(linear.weight) == 0 for linear in result.unit.linears().values())


def test_two_layers_with_another_activation_are_refused() -> None:
    unit = random_unit(4, 6, gated=False, activation=gelu)
    with pytest.raises(ModelError, match="knows ReLU"):
        prune_as_published(unit, torch.randn(3, 4), by_input_norm, HALF)
