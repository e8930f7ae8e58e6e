"""Small units, data and a solver that depends on nothing but a pattern."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from sparsellm.files.scratch import Scratch
from sparsellm.method.auxiliary import loop
from sparsellm.method.auxiliary.loop import LoopSettings, PrunedUnit
from sparsellm.method.auxiliary.objective import Chunk, Chunks, FeedForward, Linear
from sparsellm.method.gram import Gram
from sparsellm.method.solvers import Solution, Solver
from sparsellm.method.solvers.support import refine_on_support
from sparsellm.model.units import Activation, relu, silu
from sparsellm.patterns import Pattern
from sparsellm.records import Iteration


def by_input_norm(weight: Tensor, gram: Gram, pattern: Pattern) -> Solution:
    """The score of Wanda: |w| times the root mean square of its input."""
    mask = pattern.mask(weight.abs() * gram.diagonal.clamp(min=0).sqrt())
    return Solution(weight * mask, mask, 0.0)


def refitted(weight: Tensor, gram: Gram, pattern: Pattern) -> Solution:
    """The same mask, with the least-squares weights on it."""
    local = by_input_norm(weight, gram, pattern)
    return Solution(
        refine_on_support(
            weight, gram, local.mask, local.weight, 30, damping=1e-3
        ).weight,
        local.mask,
        0.0,
    )


def read(chunks: Sequence[Chunk]) -> Chunks:
    return [lambda chunk=chunk: chunk for chunk in chunks]  # type: ignore[misc]


def prune(
    dense: FeedForward,
    train: Chunks,
    held_out: Chunks,
    solver: Solver,
    patterns: Pattern | Mapping[str, Pattern],
    settings: LoopSettings | None = None,
    scratch: Scratch | None = None,
) -> tuple[PrunedUnit, list[Iteration]]:
    """The loop with one solver for all linears, and one pattern or several."""
    by_role = (
        dict.fromkeys(dense.linears(), patterns)
        if isinstance(patterns, Pattern)
        else patterns
    )
    solvers = {
        role: partial(solver, pattern=pattern) for role, pattern in by_role.items()
    }
    return loop.prune_feed_forward(
        dense,
        train,
        held_out,
        solvers,
        settings or LoopSettings(),
        scratch or Scratch(),
    )


def assert_same(one: FeedForward, other: FeedForward) -> None:
    for role, linear in one.linears().items():
        assert torch.equal(linear.weight, other.linears()[role].weight)


def random_unit(
    d: int,
    f: int,
    *,
    gated: bool = False,
    bias: bool = False,
    activation: Activation | None = None,
    seed: int = 0,
) -> FeedForward:
    """Gated with SiLU or two-layer with ReLU, if no activation is given."""
    generator = torch.Generator().manual_seed(seed)
    activation = activation or (silu if gated else relu)

    def linear(outputs: int, inputs: int) -> Linear:
        weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        return Linear(
            weight, torch.randn(outputs, generator=generator) if bias else None
        )

    return FeedForward(
        linear(f, d), linear(d, f), activation, linear(f, d) if gated else None
    )


def random_chunks(
    unit: FeedForward,
    sizes: list[int],
    *,
    weights: bool = False,
    seed: int = 1,
    outlier: float = 0.0,
) -> Chunks:
    """Inputs with a decaying spectrum, as hidden states have; targets are what the dense unit makes of them."""
    generator = torch.Generator().manual_seed(seed)
    d = unit.up.weight.shape[1]
    mix = torch.randn(d, d, generator=generator) * torch.logspace(0, -1.5, d)
    chunks = []
    for size in sizes:
        x = torch.randn(size, d, generator=generator) @ mix.T
        if outlier:
            x[:: max(size // 3, 1), 0] = outlier * x.std()
        chunks.append(
            Chunk(
                x,
                unit(x),
                torch.rand(size, generator=generator) + 0.1 if weights else None,
            )
        )
    return read(chunks)
