import pytest
import torch
from transformers.activations import ACT2FN

from sparsellm.chain.activations import KNOWN, as_activation, generic, identify
from sparsellm.decomposition.updates import update_gate_preactivation
from sparsellm.errors import ModelError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("relu", "relu"),
        ("relu2", "relu2"),
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("quick_gelu", "quick_gelu"),
        ("relu6", None),
        ("sigmoid", None),
        ("tanh", None),
        ("linear", None),
        ("mish", None),
        ("gelu_10", None),
    ],
)
def test_activations_of_transformers_are_recognised_by_value(name: str, expected: str | None) -> None:
    found = identify(ACT2FN[name])
    assert (found.name if found else None) == expected


def test_callables_that_are_no_activation_are_not_recognised() -> None:
    assert identify(lambda z: z.sum()) is None
    assert identify(lambda z: (z, z)) is None
    assert identify(torch.nn.Linear(3, 3)) is None


@pytest.mark.parametrize("activation", KNOWN, ids=lambda a: a.name)
def test_derivatives_are_those_of_autograd(activation) -> None:  # type: ignore[no-untyped-def]
    z = torch.cat([torch.linspace(-9, 9, 397), torch.tensor([1e-3, -1e-3])]).double()
    z = z[z != 0].requires_grad_(True)
    value = activation.function(z)
    (first,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    second = torch.zeros_like(z)
    if first.requires_grad:
        (second,) = torch.autograd.grad(first.sum(), z)
    for ours, theirs in zip(activation.derivatives(z.detach()), (value, first, second), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", KNOWN, ids=lambda a: a.name)
def test_derivatives_leave_their_input_alone_and_stay_finite(activation) -> None:  # type: ignore[no-untyped-def]
    z = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4])
    before = z.clone()
    for value in activation.derivatives(z):
        assert torch.isfinite(value).all()
    assert torch.equal(z, before)


def test_a_generic_activation_takes_derivatives_from_autograd() -> None:
    mish = generic(torch.nn.functional.mish, "mish")
    z = torch.linspace(-4, 4, 81, dtype=torch.float64)
    step = 1e-4
    value, first, second = mish.derivatives(z)
    numeric = (mish(z + step) - mish(z - step)) / (2 * step)
    curve = (mish(z + step) - 2 * mish(z) + mish(z - step)) / step**2
    torch.testing.assert_close(value, mish(z))
    torch.testing.assert_close(first, numeric, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(second, curve, rtol=1e-5, atol=1e-5)
    assert as_activation(torch.nn.SiLU()).name == "silu"
    assert as_activation(torch.nn.Mish()).name == "Mish"
    assert torch.equal(generic(lambda z: 2 * z, "double").derivatives(z)[2], torch.zeros_like(z))


def test_a_generic_activation_must_be_elementwise() -> None:
    with pytest.raises(ModelError, match="not elementwise"):
        generic(lambda z: z.softmax(dim=-1), "softmax")


@pytest.mark.parametrize("function", [lambda z: z, torch.nn.Mish(inplace=True), torch.tanh], ids=["same", "in", "tanh"])
def test_a_generic_activation_never_changes_what_it_is_given(function) -> None:  # type: ignore[no-untyped-def]
    activation = generic(function)
    m, a, z, u = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    kept = [t.clone() for t in (m, a, z, u)]
    found = update_gate_preactivation(m, a, z, u, activation, alpha=1.0, gamma=2.0, steps=9)
    assert all(torch.equal(t, before) for t, before in zip((m, a, z, u), kept, strict=True))
    x = found.double().requires_grad_(True)
    ((x - m) ** 2 + 2 * (a - function(x.clone()) * u) ** 2).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().median() < 1e-4
