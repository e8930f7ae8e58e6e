"""Activation functions with the derivatives that the scalar problems of the alternating minimisation need.

A model's activation is recognised *by value*: the callable is evaluated on a grid and compared with each function known
here. No class name and no configuration key is read, so every spelling of the same function is the same function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsellm.errors import ModelError

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


def _probe() -> Tensor:
    # the irregular step keeps the grid off the symmetric points where different functions agree
    return torch.arange(-20.0, 20.0, 0.0371)


def identify(function: Function) -> Activation | None:
    """The known activation whose values are those of ``function``, or None.

    ``function`` is a module or any callable of one tensor. It is probed with an fp32 tensor on the CPU from −20 to 20;
    the two GELUs differ there by 5e-4, two roundings of the same function by less than 1e-5.
    """
    z = _probe()
    try:
        with torch.no_grad():
            value = function(z.clone())
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    if not isinstance(value, Tensor) or value.shape != z.shape:
        return None
    for known in KNOWN:
        if torch.allclose(value.float(), known(z), rtol=1e-5, atol=2e-5):
            return known
    return None


def generic(function: Function, name: str = "generic") -> Activation:
    """Any smooth elementwise callable as an activation; its derivatives come from autograd.

    Raises:
        ModelError: the callable does not keep the shape, or an output depends on other elements than its own input.
    """
    z = _probe()
    with torch.no_grad():
        value, some = function(z.clone()), function(z[::3].flip(0))  # other neighbours, another order
    if value.shape != z.shape or not torch.allclose(value[::3].flip(0), some, rtol=1e-4, atol=1e-5):
        raise ModelError(f"activation {name!r} is not elementwise; give one that maps each element by itself")

    def apart(z: Tensor) -> Tensor:
        return function(z.clone())  # it may work in place, or hand back its very input

    def derivatives(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            x = z.detach().requires_grad_(True)
            value = apart(x)
            (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
            second = None
            if first.requires_grad:  # a piecewise linear φ has no graph left
                (second,) = torch.autograd.grad(first.sum(), x, allow_unused=True)
        second = torch.zeros_like(z) if second is None else second
        return value.detach(), first.detach().clone(), second.detach().clone()  # autograd may share or expand them

    return Activation(name, apart, derivatives)


def as_activation(function: Function) -> Activation:
    """``identify(function)``, or its generic wrapping when it is none of the known ones."""
    return identify(function) or generic(function, getattr(function, "__name__", type(function).__name__))
