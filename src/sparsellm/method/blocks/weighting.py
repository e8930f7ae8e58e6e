"""Weights in a squared error: tokens count by the norm of their hidden state, outputs by their cost to the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsellm import parallel
from sparsellm.errors import NumericalError
from sparsellm.method.blocks.task import BlockTask
from sparsellm.method.solvers import SOLVERS, Solver
from sparsellm.method.solvers.prepared import prepared


def token_weights(hidden: Sequence[Tensor], medians: float) -> list[Tensor]:
    """The weight ``min(1, (medians · median norm / norm)²)`` of each token, in batches ``(batch, seq)``, for batches
    ``(batch, seq, hidden)``.

    Without weights, a few tokens with massive activations (2402.17762) would dominate every squared error."""
    norms = [batch.float().norm(dim=-1) for batch in hidden]
    own_norms = torch.cat([norm.flatten() for norm in norms])
    limit = medians * torch.cat(parallel.gather_list(own_norms)).median()
    if not 0 < limit < math.inf:
        raise NumericalError(
            f"the median norm of the hidden states that enter a block is {float(limit) / medians:.3g} in fp32: look "
            "for damaged weights before it, or give options.norm_weighting 0"
        )
    return [(limit / norm.clamp(min=1e-30)).square().clamp(max=1.0) for norm in norms]


def weighted_solvers(task: BlockTask, solver: str, power: float) -> dict[str, Solver]:
    """The local solver of each linear, by name. Outputs compete for weights by ``E[g²]^power``.

    Outputs have equal weight if ``power`` is 0, for N:M, where outputs do not compete, and if no token came."""
    chain = task.stream.chain
    solvers = {}
    for linear in task.linears:
        costs = None
        if power and linear.name in task.output_costs:
            costs = task.output_costs[linear.name].to(chain.device).pow(power)
            costs = (costs / costs.mean().clamp(min=1e-30)).clamp(min=1e-4)
        solvers[linear.name] = prepared(SOLVERS[solver], chain.products, costs)
    return solvers
