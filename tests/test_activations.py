import pytest
import torch
from transformers.activations import ACT2FN

from sparsellm.chain.activations import KNOWN


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


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("relu", "relu"),
        ("relu2", "relu2"),
        ("silu", "silu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("quick_gelu", "quick_gelu"),
    ],
)
def test_values_are_those_of_transformers(name: str, known: str) -> None:
    z = torch.arange(-20.0, 20.0, 0.0371)
    (activation,) = (each for each in KNOWN if each.name == known)
    torch.testing.assert_close(activation(z), ACT2FN[name](z), rtol=1e-5, atol=2e-5)
