"""The published algorithm as a setting of the loop, against its formulas written out on whole matrices in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sparsellm.errors import NumericalError
from sparsellm.method.auxiliary.loop import LoopSettings, PrunedUnit
from sparsellm.method.auxiliary.objective import FeedForward, true_error
from sparsellm.method.gram import Gram
from sparsellm.method.solvers import SOLVERS
from sparsellm.patterns import NM, Pattern
from tests.method.auxiliary.helpers import (
    assert_same,
    prune,
    random_chunks,
    random_unit,
)
from tests.method.solvers.problems import column_by_column
from tests.shares import Share

sparsegpt = SOLVERS["sparsegpt"].function


@dataclass
class Plain:
    """A unit with columns of tokens, as in the paper: ``W2 φ(W1 X + b1) + b2`` or ``W2 (silu(Ws X) ∘ W1 X)``."""

    w1: Tensor
    w2: Tensor
    b1: Tensor
    b2: Tensor
    ws: Tensor | None


def plain_of(unit: FeedForward) -> Plain:
    weights = [linear.weight.double() for linear in (unit.up, unit.down)]
    biases = [
        torch.zeros(1) if linear.bias is None else linear.bias
        for linear in (unit.up, unit.down)
    ]
    gate = unit.gate.weight.double() if unit.gate else None
    return Plain(*weights, *(bias.double()[:, None] for bias in biases), gate)


class Hessian:
    """The stored matrix of the published solver, to which each call adds its damping."""

    def __init__(self, inputs: Tensor) -> None:
        self.matrix = inputs @ inputs.T / inputs.shape[1]

    def prune(self, weight: Tensor, pattern: Pattern) -> Tensor:
        pruned = column_by_column(
            weight,
            Gram(self.matrix.float(), 1),
            pattern,
            4 if isinstance(pattern, NM) else 128,
        )
        self.matrix = (
            self.matrix
            + 0.01
            * self.matrix.diagonal().mean()
            * torch.eye(len(self.matrix)).double()
        )
        return pruned


def published(
    unit: FeedForward,
    tokens: Tensor,
    pattern: Pattern,
    epochs: int,
) -> Plain:
    """The loop of the paper (algorithm 1, eq. 5 to 8, section 3.4) on one unit, with the settings of its code."""
    now, x = plain_of(unit), tokens.double().T  # (d, tokens)
    z = now.w1 @ x + now.b1
    s = now.ws @ x if now.ws is not None else None
    p = z.relu() if s is None else torch.nn.functional.silu(s) * z
    y = now.w2 @ p + now.b2
    x_inverse = torch.linalg.pinv(x)
    of_up, of_gate, of_down = Hessian(x), Hessian(x), Hessian(p)
    alpha = beta = gamma = 0.1 if s is None else 5.0
    for epoch in range(epochs):
        if epoch > 0:  # weights
            now.w1 = (z - now.b1) @ x_inverse
            if s is not None:
                now.ws = s @ x_inverse
                now.w2 = (y - now.b2) @ torch.linalg.pinv(p)
            else:
                weight = now.w2.clone().requires_grad_()
                for _ in range(10):
                    (slope,) = torch.autograd.grad(
                        (weight @ p + now.b2 - y).square().mean(), weight
                    )
                    weight = (weight - 0.01 * slope).detach().requires_grad_()
                now.w2 = weight.detach()
            of_down = Hessian(p)
        now.w1 = of_up.prune(now.w1, pattern)
        if now.ws is not None:
            now.ws = of_gate.prune(now.ws, pattern)
        now.w2 = of_down.prune(now.w2, pattern)
        # activations
        system = beta * now.w2.T @ now.w2 + gamma * torch.eye(len(p)).double()
        made = z.relu() if s is None else torch.nn.functional.silu(s) * z
        p = torch.linalg.inv(system) @ (beta * now.w2.T @ (y - now.b2) + gamma * made)
        m = now.w1 @ x + now.b1  # pre-activations
        if s is None or now.ws is None:
            candidates = [
                ((gamma * p + alpha * m) / (gamma + alpha)).clamp(min=0),
                m.clamp(max=0),
            ]
            costs = [
                gamma * (p - candidate.relu()) ** 2 + alpha * (candidate - m) ** 2
                for candidate in candidates
            ]
            z = torch.where(costs[0] <= costs[1], *candidates)
        else:
            swish = torch.nn.functional.silu(s)
            z = (m + swish * p) / (swish**2 + 1)
            for _ in range(2):
                free = s.clone().requires_grad_()
                cost = alpha * (free - now.ws @ x).square().sum()
                cost = (
                    cost
                    + gamma * (p - torch.nn.functional.silu(free) * z).square().sum()
                )
                (slope,) = torch.autograd.grad(cost, free)
                s = s - 0.01 * slope
    return now


@pytest.mark.parametrize("epochs", [1, 2, 4])
@pytest.mark.parametrize("pattern", [Share(0.5), NM(2, 4)], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["OPT", "LLaMA"])
def test_every_epoch_is_that_of_the_published_formulas(
    gated: bool, pattern: Pattern, epochs: int
) -> None:
    unit = random_unit(8, 12, gated=gated, bias=not gated)
    chunks = random_chunks(unit, [70, 30, 60])
    tokens = torch.cat([chunk().inputs for chunk in chunks])
    pruned, history = prune(
        unit,
        chunks,
        [],
        sparsegpt,
        pattern,
        LoopSettings.of_the_paper(epochs, gated=gated),
    )
    expected, result = (
        published(unit, tokens, pattern, epochs),
        plain_of(pruned.unit),
    )
    for name in ("w1", "w2", "b1", "b2", *(["ws"] if gated else [])):
        ours, theirs = getattr(result, name), getattr(expected, name)
        assert torch.equal(ours != 0, theirs != 0), name
        torch.testing.assert_close(
            ours, theirs, rtol=5e-3, atol=5e-4 * float(theirs.abs().max()), msg=name
        )
    assert [step.chosen for step in history] == [False] * (epochs - 1) + [True]


@pytest.mark.parametrize(("gated", "outlier"), [(True, 30.0), (False, 1000.0)])
def test_the_safeguard_never_ends_worse_than_sparsegpt(
    gated: bool, outlier: float
) -> None:
    """Massive activations: gradient steps overshoot on S in the one unit, on the last weight in the other."""
    unit = random_unit(16, 48, gated=gated, bias=not gated)
    chunks = random_chunks(unit, [200, 200], outlier=outlier)

    def run(epochs: int, safeguard: bool = False) -> tuple[PrunedUnit, list[float]]:
        settings = LoopSettings.of_the_paper(epochs, gated=gated, safeguard=safeguard)
        pruned, history = prune(unit, chunks, [], sparsegpt, Share(0.7), settings)
        return pruned, [step.train_error or 0.0 for step in history]

    local, _ = run(1)
    if gated:
        assert run(6)[0].error > 1000 * local.error
    else:
        with pytest.raises(
            NumericalError, match=r"diverged in iteration 1 \(.* before it: 0\.00473\)"
        ):
            run(6)
    safe, errors = run(6, safeguard=True)
    assert errors[0] == local.error
    assert max(errors) > 1000 * local.error
    assert true_error(safe.unit, chunks) == safe.error == min(errors) == local.error
    assert_same(safe.unit, local.unit)
