"""Units inside a block, recognised by the values that pass between linears: no name is read.

A feed-forward unit is known by its activation, attention's values by what it does to them: it mixes tokens linearly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsellm.chain.capture import giving, watch
from sparsellm.chain.linears import LinearView
from sparsellm.decomposition.activations import KNOWN, Activation

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


@dataclass(frozen=True)
class ValueOutput:
    """Attention's ``value``, and ``output``, whose input is linear in what ``value`` gives, all else fixed."""

    value: LinearView
    output: LinearView


def find_value_output(earlier: list[LinearView], output: LinearView, run: Callable[[], Any]) -> ValueOutput | None:
    """The one of ``earlier`` of whose results attention mixes tokens linearly on the way to ``output``; None where no
    linear, or more than one, is such (queries, keys and values of one fused linear are not).

    Twice the values must give twice the input, and the first token's values must reach other tokens.

    Args:
        earlier: candidates, linears that run before.
        output: the linear whose input is looked at.
        run: runs the block once, on little.
    """
    plain = _entering(output, run)
    if plain.dim() != 3:  # tokens of all windows in one row: who mixes with whom cannot be seen
        return None
    found = []
    for linear in earlier:
        doubled = _entering(output, run, replaced=linear, by=lambda given: given * 2)
        if _distance(doubled, plain * 2) > TOLERANCE:
            continue
        reached = _entering(output, run, replaced=linear, by=_without_first_token)
        moved = (reached - plain).norm(dim=-1)[:, 1:]  # (windows, seq - 1)
        if float(moved.norm()) > TOLERANCE * float(plain[:, 1:].norm()):
            found.append(ValueOutput(linear, output))
    return found[0] if len(found) == 1 else None


def _without_first_token(given: Tensor) -> Tensor:
    changed = given.clone()
    changed[:, 0] = 0
    return changed


def _entering(
    output: LinearView,
    run: Callable[[], Any],
    replaced: LinearView | None = None,
    by: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """What enters ``output``, fp32 (windows, seq, features), while another gives what ``by`` makes of its own."""
    seen: list[Tensor] = []
    with contextlib.ExitStack() as hooks:
        if replaced is not None and by is not None:
            hooks.enter_context(giving(replaced, by))
        hooks.enter_context(watch([output], lambda linear, entering, leaving: seen.append(_copied(entering))))
        run()
    return seen[0]


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
    """A copy ``(tokens, features)`` in fp32."""
    return _copied(values).flatten(0, -2)


def _copied(values: Tensor) -> Tensor:
    """fp32: what runs later may work in place."""
    return values.detach().to(torch.float32, copy=True)


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
