"""Feed-forward units of a block, recognised by the values that pass between linears, not by names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsellm.chain.activations import KNOWN, Activation
from sparsellm.chain.capture import watch
from sparsellm.chain.linears import LinearView

TOLERANCE = 1e-2  # above the rounding of half precision, far below the distance of a wrong activation


@dataclass(frozen=True)
class FeedForwardUnit:
    """``down(φ(up(x)))``, or ``down(φ(gate(x)) ∘ up(x))``."""

    up: LinearView
    down: LinearView
    activation: Activation
    gate: LinearView | None = None

    def linears(self) -> list[LinearView]:
        return [self.up, *([self.gate] if self.gate is not None else []), self.down]


def find_feed_forward(linears: list[LinearView], run: Callable[[], Any]) -> list[FeedForwardUnit]:
    """The feed-forward units among the linears of a block, recognised during one run of it.

    A linear is ``down`` of a unit if its input equals φ(output of an earlier linear), or φ(output of an earlier linear)
    times the output of another, for a known φ. A block with another kind of feed-forward network has no unit.

    Args:
        linears: the linears of one block.
        run: runs the block once, on few tokens.
    """
    seen: list[tuple[LinearView, Tensor, Tensor]] = []

    def see(linear: LinearView, entering: Tensor, leaving: Tensor) -> None:
        seen.append((linear, _rows(entering), _rows(leaving)))

    with watch(linears, see):
        run()
    units = []
    for position, (down, entering, _) in enumerate(seen):
        earlier = [(linear, given, out) for linear, given, out in seen[:position] if out.shape == entering.shape]
        unit = _match(down, entering, earlier)
        if unit is not None:
            units.append(unit)
    return units


def _match(
    down: LinearView, entering: Tensor, earlier: list[tuple[LinearView, Tensor, Tensor]]
) -> FeedForwardUnit | None:
    """The unit that reproduces the input of ``down`` best; None if none is within :data:`TOLERANCE`.

    Several may be: the GELUs, for example, differ by no more than the rounding of half precision.
    """
    candidates: list[tuple[float, int, FeedForwardUnit]] = []
    for activation in KNOWN:
        for first, given, out in earlier:
            value = activation(out.clone())
            candidates.append((_distance(value, entering), len(candidates), FeedForwardUnit(first, down, activation)))
            for second, other, factor in earlier:
                if second is not first and given.shape == other.shape and torch.equal(given, other):
                    unit = FeedForwardUnit(second, down, activation, gate=first)
                    candidates.append((_distance(value * factor, entering), len(candidates), unit))
    if not candidates:
        return None
    distance, _, unit = min(candidates)
    return unit if distance <= TOLERANCE else None


def _rows(values: Tensor) -> Tensor:
    """A copy ``(tokens, features)`` in fp32, since later operations may change the tensor in place."""
    return values.detach().to(torch.float32, copy=True).flatten(0, -2)


def _distance(value: Tensor, wanted: Tensor) -> float:
    """``‖value − wanted‖ / ‖wanted‖``."""
    return float((value - wanted).norm() / wanted.norm().clamp(min=1e-30))
