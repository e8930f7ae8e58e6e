"""Feed-forward units inside a block, recognised by the values that pass between linears: no name is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsellm.chain.activations import KNOWN, Activation
from sparsellm.chain.capture import watch
from sparsellm.chain.linears import LinearView

TOLERANCE = 1e-2  # rounding of half precision; an activation that is not the right one is off by far more


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
    """The feed-forward units among the linears of a block, found by running it once.

    A linear is ``down`` of a unit if its input equals φ of what one earlier linear gave, or φ of what one gave times
    what another gave, for a known φ. A block whose feed-forward network is something else simply has no unit.

    Args:
        linears: the linears of one block.
        run: runs the block once, on little.
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
    """The closest of all that fit: two functions such as the GELUs may both be within rounding of half precision."""
    found: list[tuple[float, int, FeedForwardUnit]] = []
    for activation in KNOWN:
        for first, given, out in earlier:
            value = activation(out.clone())
            found.append((_distance(value, entering), len(found), FeedForwardUnit(first, down, activation)))
            for second, other, factor in earlier:
                if second is not first and given.shape == other.shape and torch.equal(given, other):
                    unit = FeedForwardUnit(second, down, activation, gate=first)
                    found.append((_distance(value * factor, entering), len(found), unit))
    if not found:
        return None
    distance, _, unit = min(found)
    return unit if distance <= TOLERANCE else None


def _rows(values: Tensor) -> Tensor:
    """A copy ``(tokens, features)`` in fp32: linears that run later may work in place."""
    return values.detach().to(torch.float32, copy=True).flatten(0, -2)


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
