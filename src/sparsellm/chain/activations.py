"""The activation functions of feed-forward units, with the derivative that updates of auxiliary variables need.

A model's activation is recognised by its values (see ``units``): no class name and no configuration key is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

Derivatives = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Activation:
    """An elementwise function φ.

    ``derivatives(z)`` returns ``(φ(z), φ'(z))``, computed together because they share their expensive parts.
    """

    name: str
    function: Callable[[Tensor], Tensor] = field(repr=False)
    derivatives: Callable[[Tensor], Derivatives] = field(repr=False)

    def __call__(self, z: Tensor) -> Tensor:
        return self.function(z)


def _relu(z: Tensor) -> Derivatives:
    return torch.relu(z), (z > 0).to(z.dtype)


def _relu2(z: Tensor) -> Derivatives:
    positive = torch.relu(z)
    return positive.square(), 2 * positive


def _sloped_silu(z: Tensor, slope: float) -> Derivatives:
    """z σ(kz): SiLU for k = 1, the sigmoid approximation of GELU for k = 1.702."""
    gate = torch.sigmoid(z * slope)
    rest = (1 - gate) * slope
    value = z * gate
    return value, torch.addcmul(gate, value, rest)


def _gelu(z: Tensor) -> Derivatives:
    density = torch.exp(z.square().mul_(-0.5)).mul_(1 / math.sqrt(2 * math.pi))
    distribution = torch.erf(z * math.sqrt(0.5)).add_(1).mul_(0.5)
    return z * distribution, torch.addcmul(distribution, z, density)


def _gelu_tanh(z: Tensor) -> Derivatives:
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    square = z.square()
    t = torch.tanh((square * cubic).add_(1).mul_(z).mul_(scale))
    slope = (square * (3 * cubic)).add_(1).mul_(scale)  # d(argument)/dz
    dt = t.square().neg_().add_(1).mul_(slope)  # dt/dz
    half = (t + 1).mul_(0.5)
    return z * half, torch.addcmul(half, z, dt, value=0.5)


relu = Activation("relu", torch.relu, _relu)
relu2 = Activation("relu2", lambda z: torch.relu(z).square(), _relu2)
silu = Activation("silu", functional.silu, partial(_sloped_silu, slope=1.0))
gelu = Activation("gelu", functional.gelu, _gelu)
gelu_tanh = Activation("gelu_tanh", partial(functional.gelu, approximate="tanh"), _gelu_tanh)
quick_gelu = Activation("quick_gelu", lambda z: z * torch.sigmoid(1.702 * z), partial(_sloped_silu, slope=1.702))

KNOWN = (relu, relu2, silu, gelu, gelu_tanh, quick_gelu)
