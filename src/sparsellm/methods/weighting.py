"""Weights in a squared error: tokens count by the norm of their hidden state, outputs by their cost to the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsellm import parallel
from sparsellm.methods.task import BlockTask
from sparsellm.patterns import Pattern
from sparsellm.solvers import SOLVERS, Solution, Solver
from sparsellm.solvers.divided import divide, divided_solution
from sparsellm.statistics import Gram


def token_weights(hidden: Sequence[Tensor], medians: float) -> list[Tensor]:
    """The weight ``min(1, (medians · median norm / norm)²)`` of each token.

    Without weights, a few tokens with massive activations (2402.17762) would dominate every squared error.

    Args:
        hidden: batches ``(batch, seq, hidden)``.
        medians: tokens with norms up to this multiple of the median have weight 1.

    Returns:
        Weights ``(batch, seq)`` for each batch.
    """
    norms = [batch.float().norm(dim=-1) for batch in hidden]
    limit = medians * torch.cat(parallel.gather_list(torch.cat([norm.flatten() for norm in norms]))).median()
    return [(limit / norm.clamp(min=1e-30)).square().clamp(max=1.0) for norm in norms]


def weighted_solvers(task: BlockTask, solver: str, power: float) -> dict[str, Solver]:
    """The local solver of each linear, by name; its outputs compete for weights by ``E[g²]^power``.

    Outputs have equal weight if ``power`` is 0, for N:M, where outputs do not compete, and in a linear that no token
    reached.
    """
    plain = divide(SOLVERS[solver], task.stream.chain.products)
    solvers = {}
    for linear in task.linears:
        costs = task.output_costs.get(linear.name) if power else None
        if costs is not None:
            costs = costs.to(task.stream.chain.device).pow(power)
            costs = (costs / costs.mean().clamp(min=1e-30)).clamp(min=1e-4)
        solvers[linear.name] = weighted(plain, costs)
    return solvers


def weighted(solver: Solver, costs: Tensor | None) -> Solver:
    """A solver of ``Σ_i c_i ‖(w_i − w̃_i) G^½‖²`` for weights ``c (out,)`` of the outputs' squared errors.

    This is the plain objective of ``√c_i w_i``, so the plain solver gets rows scaled by ``√c_i``. The error in the
    solution is the unweighted one. With ``costs`` None it is the solver itself.
    """
    if costs is None:
        return solver
    root = costs.sqrt()[:, None]  # (out, 1)

    def solve(weight: Tensor, gram: Gram, pattern: Pattern) -> Solution:
        scaled = solver(weight * root, gram, pattern)
        return divided_solution(weight, scaled.weight / root, scaled.mask, gram, scaled.notes)

    return solve
