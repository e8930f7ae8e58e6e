"""Feed-forward units of a block and their activations, recognised by the values that pass between linears.

No class name and no configuration key is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from sparsellm.model.capture import watch
from sparsellm.model.streams import Stream
from sparsellm.model.structure import LinearView

TOLERANCE = 1e-2  # above the rounding of half precision, far below the distance of a wrong activation


@dataclass(frozen=True)
class Activation:
    """An elementwise function φ."""

    name: str
    function: Callable[[Tensor], Tensor] = field(repr=False)

    def __call__(self, z: Tensor) -> Tensor:
        return self.function(z)

    def derivatives(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``(φ(z), φ'(z))``."""
        both = torch.func.jvp(self.function, (z,), (torch.ones_like(z),))
        return both[0], both[1]


relu = Activation("relu", torch.relu)
relu2 = Activation("relu2", lambda z: torch.relu(z).square())
silu = Activation("silu", functional.silu)
gelu = Activation("gelu", functional.gelu)
gelu_tanh = Activation("gelu_tanh", partial(functional.gelu, approximate="tanh"))
quick_gelu = Activation("quick_gelu", lambda z: z * torch.sigmoid(1.702 * z))

T = TypeVar("T")  # a linear
KNOWN = (relu, relu2, silu, gelu, gelu_tanh, quick_gelu)


@dataclass(frozen=True)
class FeedForwardUnit(Generic[T]):
    """Two-layer ``down(φ(up(x)))``, or gated ``down(φ(gate(x)) ∘ up(x))``; up and gate (f, d), down (d_out, f)."""

    up: T
    down: T
    activation: Activation
    gate: T | None = None

    def first_half(self) -> dict[str, T]:
        """The linears by role: up, and gate if there is one."""
        linears = {"up": self.up}
        if self.gate is not None:
            linears["gate"] = self.gate
        return linears

    def linears(self) -> dict[str, T]:
        """The linears by role, in the order in which they run: up, gate (if there is one), down."""
        return {**self.first_half(), "down": self.down}


# the unit of a block, before it is read into tensors
Unit = FeedForwardUnit[LinearView]


@dataclass(frozen=True)
class _Seen:
    """One call of a linear, ``(tokens, features)``, in fp32."""

    linear: LinearView
    input: Tensor
    output: Tensor


def find_feed_forward(
    linears: list[LinearView], stream: Stream, index: int
) -> list[Unit]:
    """The feed-forward units among the linears of the loaded block ``index``, recognised while it runs on one window: a
    linear is ``down`` if its input equals φ(output of an earlier linear), or that times the output of another."""
    seen: list[_Seen] = []
    with watch(
        linears, lambda linear, x, y: seen.append(_Seen(linear, _rows(x), _rows(y)))
    ):
        stream.run_window(index)
    units = (_unit_of(down, seen[:position]) for position, down in enumerate(seen))
    return [unit for unit in units if unit is not None]


def _unit_of(down: _Seen, before: list[_Seen]) -> Unit | None:
    """The unit that reproduces the input of ``down`` best; None if none is within ``TOLERANCE``. Several may be:
    the GELUs differ by no more than the rounding of half precision."""
    earlier = [call for call in before if call.output.shape == down.input.shape]
    candidates: list[tuple[float, Unit]] = []
    for activation in KNOWN:
        for first in earlier:
            value = activation(first.output.clone())
            plain = Unit(first.linear, down.linear, activation)
            candidates.append((_distance(value, down.input), plain))
            for second in earlier:
                if second is not first and torch.equal(first.input, second.input):
                    gated = replace(plain, up=second.linear, gate=first.linear)
                    distance = _distance(value * second.output, down.input)
                    candidates.append((distance, gated))
    distance, unit = min(
        candidates, key=lambda candidate: candidate[0], default=(TOLERANCE + 1, None)
    )
    if distance > TOLERANCE:
        return None
    return unit


def _rows(values: Tensor) -> Tensor:
    """A copy ``(tokens, features)`` in fp32, since later operations may change the tensor in place."""
    return values.detach().to(torch.float32, copy=True).flatten(0, -2)


def _distance(value: Tensor, target: Tensor) -> float:
    """``‖value − target‖ / ‖target‖``."""
    return float((value - target).norm() / target.norm().clamp(min=1e-30))
