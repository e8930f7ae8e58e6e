"""The activation functions of feed-forward units, with the derivatives that updates of auxiliary variables need.

A model's activation is recognised by its values (see ``units``): no class name and no configuration key is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
Derivatives = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Activation:
    """An elementwise function φ.

    ``derivatives(z)`` returns ``(φ(z), φ'(z), φ''(z))``, computed together because they share their expensive parts.
    """

    name: str
    function: Function = field(repr=False)
    derivatives: Derivatives = field(repr=False)

    def __call__(self, z: Tensor) -> Tensor:
        return self.function(z)


def _relu(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.relu(z), (z > 0).to(z.dtype), torch.zeros_like(z)


def _relu2(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    positive = torch.relu(z)
    return positive.square(), 2 * positive, 2 * (z > 0).to(z.dtype)


def _sloped_silu(z: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    """z σ(kz): SiLU for k = 1, the sigmoid approximation of GELU for k = 1.702."""
    gate = torch.sigmoid(z * slope)
    rest = (1 - gate) * slope
    value = z * gate
    first = torch.addcmul(gate, value, rest)
    # σ' k (2 + z k (1 − 2σ)), with σ' = σ(1 − σ)
    second = gate.mul_(rest).mul_((rest * 2).sub_(slope).mul_(z).add_(2))
    return value, first, second


def _silu(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _sloped_silu(z, 1.0)


def _quick_gelu(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _sloped_silu(z, 1.702)


def _gelu(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    density = torch.exp(z.square().mul_(-0.5)).mul_(1 / math.sqrt(2 * math.pi))
    distribution = torch.erf(z * math.sqrt(0.5)).add_(1).mul_(0.5)
    value = z * distribution
    first = torch.addcmul(distribution, z, density)
    return value, first, density.mul_(z.square().neg_().add_(2))


_TANH_SCALE, _TANH_CUBIC = math.sqrt(2 / math.pi), 0.044715


def _gelu_tanh(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    square = z.square()
    t = torch.tanh((square * _TANH_CUBIC).add_(1).mul_(z).mul_(_TANH_SCALE))
    slope = (square * (3 * _TANH_CUBIC)).add_(1).mul_(_TANH_SCALE)  # d(argument)/dz
    dt = t.square().neg_().add_(1).mul_(slope)  # dt/dz
    half = (t + 1).mul_(0.5)
    value = z * half
    first = torch.addcmul(half, z, dt, value=0.5)
    # d²t/dz² = dt · (argument''/slope − 2 t slope); argument'' = 6 c s z, and dt/slope = 1 − t²
    curve = (1 - t.square()) * (z * (6 * _TANH_CUBIC * _TANH_SCALE)) - 2 * t * slope * dt
    return value, first, torch.addcmul(dt, z, curve, value=0.5)


def _function_quick_gelu(z: Tensor) -> Tensor:
    return z * torch.sigmoid(1.702 * z)


def _function_gelu_tanh(z: Tensor) -> Tensor:
    return torch.nn.functional.gelu(z, approximate="tanh")


def _function_relu2(z: Tensor) -> Tensor:
    return torch.relu(z).square()


relu = Activation("relu", torch.relu, _relu)
relu2 = Activation("relu2", _function_relu2, _relu2)
silu = Activation("silu", torch.nn.functional.silu, _silu)
gelu = Activation("gelu", torch.nn.functional.gelu, _gelu)
gelu_tanh = Activation("gelu_tanh", _function_gelu_tanh, _gelu_tanh)
quick_gelu = Activation("quick_gelu", _function_quick_gelu, _quick_gelu)

KNOWN = (relu, relu2, silu, gelu, gelu_tanh, quick_gelu)
