"""Feed-forward units are found in models that were never named to the code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.activations import ACT2FN

from sparsellm.model import open_chain
from sparsellm.model.streams import Feed
from sparsellm.model.units import KNOWN, Activation, find_feed_forward
from tests.models import tiny_gpt2, tiny_llama, tiny_opt, windows


@pytest.mark.parametrize(
    ("family", "changes", "names", "activation"),
    [
        (tiny_llama, {}, ("up_proj", "gate_proj", "down_proj"), "silu"),
        (
            tiny_llama,
            {"hidden_act": "gelu_pytorch_tanh"},
            ("up_proj", "gate_proj", "down_proj"),
            "gelu_tanh",
        ),
        (tiny_opt, {}, ("fc1", None, "fc2"), "relu"),
        (tiny_gpt2, {}, ("c_fc", None, "c_proj"), "gelu_tanh"),
        (tiny_opt, {"activation_function": "gelu"}, ("fc1", None, "fc2"), "gelu"),
    ],
)
def test_the_unit_and_its_activation_are_found(
    family: Any, changes: Any, names: Any, activation: str
) -> None:
    chain = open_chain(family(**changes), device=torch.device("cpu"))
    stream = Feed(chain, windows(1, 20, seed=1), 20).stream()
    (unit,) = find_feed_forward(chain.linears(0), stream, 0)
    assert (
        tuple(
            x.name.rpartition(".")[2] if x is not None else None
            for x in (unit.up, unit.gate, unit.down)
        )
        == names
    )
    assert unit.activation.name == activation


NAMES = {name: name for name in ("relu", "relu2", "silu", "gelu", "quick_gelu")}
NAMES |= dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), "gelu_tanh")


@pytest.mark.parametrize(("name", "known"), NAMES.items())
def test_values_are_those_of_transformers(name: str, known: str) -> None:
    z = torch.arange(-20.0, 20.0, 0.0371)
    (activation,) = (candidate for candidate in KNOWN if candidate.name == known)
    torch.testing.assert_close(activation(z), ACT2FN[name](z), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("activation", KNOWN, ids=lambda activation: activation.name)
def test_the_derivative_is_that_of_autograd(activation: Activation) -> None:
    z = torch.cat(
        [torch.linspace(-9, 9, 397), torch.tensor([1e-3, -1e-3, -1e4, 1e4])]
    ).double()
    z = z[z != 0].requires_grad_(True)
    value = activation.function(z)
    (first,) = torch.autograd.grad(value.sum(), z)
    before = z.detach().clone()
    for ours, theirs in zip(
        activation.derivatives(z.detach()), (value, first), strict=True
    ):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=1e-9)
    assert torch.equal(z, before)
