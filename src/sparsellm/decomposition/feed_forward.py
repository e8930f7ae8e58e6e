"""A feed-forward unit as plain tensors, independent of any model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsellm.decomposition.activations import Activation
from sparsellm.errors import ModelError


@dataclass(frozen=True)
class Linear:
    """``y = x weightᵀ + bias``: weight (out, in), bias (out,) or None, both fp32."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class FeedForward:
    """Two-layer ``down(φ(up(x)))``, or gated ``down(φ(gate(x)) ∘ up(x))`` when ``gate`` is given.

    up and gate (f, d), down (d_out, f).

    Raises:
        ModelError: the shapes of the linears do not fit each other.
    """

    up: Linear
    down: Linear
    activation: Activation
    gate: Linear | None = None

    def __post_init__(self) -> None:
        hidden = self.up.weight.shape[0]
        if self.down.weight.shape[1] != hidden or (self.gate and self.gate.weight.shape != self.up.weight.shape):
            shapes = {name: tuple(linear.weight.shape) for name, linear in self.linears().items()}
            raise ModelError(f"linears of a feed-forward unit do not fit each other: {shapes}")

    @property
    def hidden(self) -> int:
        return self.up.weight.shape[0]

    def linears(self) -> dict[str, Linear]:
        """By role, in the order they are used: up, gate (when there is one), down."""
        gate = {"gate": self.gate} if self.gate is not None else {}
        return {"up": self.up, **gate, "down": self.down}

    def activations(self, x: Tensor) -> Tensor:
        """(tokens, d) → (tokens, f): what enters ``down``."""
        if self.gate is None:
            return self.activation(self.up(x))
        return self.activation(self.gate(x)).mul_(self.up(x))

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, d) → (tokens, d_out)."""
        return self.down(self.activations(x))

    __call__ = forward
