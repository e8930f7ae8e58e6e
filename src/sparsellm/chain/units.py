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


@dataclass(frozen=True)
class _Seen:
    """One call of a linear: input and output ``(tokens, features)``, in fp32."""

    linear: LinearView
    input: Tensor
    output: Tensor


def find_feed_forward(linears: list[LinearView], run: Callable[[], Any]) -> list[FeedForwardUnit]:
    """The feed-forward units among the linears of a block, recognised during one run of it.

    A linear is ``down`` of a unit if its input equals φ(output of an earlier linear), or φ(output of an earlier linear)
    times the output of another, for a known φ. A block with another kind of feed-forward network has no unit.

    Args:
        linears: the linears of one block.
        run: runs the block once, on few tokens.
    """
    seen: list[_Seen] = []
    with watch(linears, lambda linear, x, y: seen.append(_Seen(linear, _rows(x), _rows(y)))):
        run()
    units = (_unit_of(down, seen[:position]) for position, down in enumerate(seen))
    return [unit for unit in units if unit is not None]


def _unit_of(down: _Seen, before: list[_Seen]) -> FeedForwardUnit | None:
    """The unit that reproduces the input of ``down`` best; None if none is within :data:`TOLERANCE`.

    Several may be: the GELUs, for example, differ by no more than the rounding of half precision.
    """
    earlier = [call for call in before if call.output.shape == down.input.shape]
    candidates: list[tuple[float, FeedForwardUnit]] = []
    for activation in KNOWN:
        for first in earlier:
            value = activation(first.output.clone())
            candidates.append((_distance(value, down.input), FeedForwardUnit(first.linear, down.linear, activation)))
            for second in earlier:
                same = second is not first and first.input.shape == second.input.shape
                if same and torch.equal(first.input, second.input):
                    unit = FeedForwardUnit(second.linear, down.linear, activation, gate=first.linear)
                    candidates.append((_distance(value * second.output, down.input), unit))
    within = [candidate for candidate in candidates if candidate[0] <= TOLERANCE]
    return min(within, key=lambda candidate: candidate[0])[1] if within else None


def _rows(values: Tensor) -> Tensor:
    """A copy ``(tokens, features)`` in fp32, since later operations may change the tensor in place."""
    return values.detach().to(torch.float32, copy=True).flatten(0, -2)


def _distance(value: Tensor, target: Tensor) -> float:
    """``‖value − target‖ / ‖target‖``."""
    return float((value - target).norm() / target.norm().clamp(min=1e-30))
