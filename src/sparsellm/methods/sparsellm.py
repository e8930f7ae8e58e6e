"""One block as coordinated small problems: each linear is fitted to what the pruned ones before it really produce.

Within a block the groups of linears that share an input are pruned in the order in which they run (q,k,v → o →
up,gate → down), and the block runs again after each, so that every statistic is of what the linear will really be
given. The last linear of each sublayer, the one that writes into the residual stream, is first fitted by least squares
to what the sublayer gave before its first linear was pruned; so it makes up for what they lost. Then the kept weights
of the block are polished together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from sparsellm.chain import LinearView
from sparsellm.chain.capture import InputGroups, watch
from sparsellm.methods.base import METHODS, BlockTask
from sparsellm.refine.reconstruct import reconstruct
from sparsellm.solvers import SOLVERS, Solution, Solver
from sparsellm.statistics import CrossAccumulator, Gram, GramAccumulator, least_squares


@dataclass
class _Moments:
    """Of one group: the Gram matrix of its input, and the cross moment with the target if there is one."""

    gram: Gram
    cross: Tensor | None


@METHODS.register("sparsellm", paper="arXiv 2402.17946, with the solver of 2406.07831 and the refinement of 2510.14444")
def sparsellm(
    task: BlockTask,
    *,
    solver: Annotated[str, "the local solver inside"] = "admm",
    refit: Annotated[bool, "fit the last linear of each sublayer to the dense sublayer's output"] = True,
    refit_damping: Annotated[float, Field(ge=0), "ridge of that fit towards the dense weight"] = 0.1,
    norm_weighting: Annotated[
        float, Field(ge=0), "tokens of a norm above so many medians count less; 0: all count"
    ] = 1.5,
    steps: Annotated[int, Field(ge=0), "steps of Adam on the kept weights of each block"] = 48,
    learning_rate: Annotated[float, Field(gt=0), "of Adam, relative to the weights' root mean square"] = 0.02,
) -> None:
    """Global pruning by auxiliary targets: linears in the order they run, each fitted to what is left to it."""
    if not any(task.patterns[linear.name].sparsity for linear in task.linears):
        return  # nothing is lost, so nothing is to be made up for: every bit stays
    solve = partial(_solve, task, SOLVERS[solver].function)
    weights = token_weights(task.stream.hidden, norm_weighting) if norm_weighting else None
    with task.clock.phase("prune/targets"):
        dense_outputs = list(task.stream.run(task.index)) if steps else []
    groups = _groups(task)
    width = task.stream.hidden[0].shape[-1]
    targets: dict[str, list[Tensor]] = {}
    entered = 0  # groups before this one belong to sublayers that are done
    for position, group in enumerate(groups):
        writers = [g[0] for g in groups[entered:] if len(g) == 1 and g[0].out_features == width]
        writer = writers[0] if writers else None
        first = position == entered
        task.report("+".join(linear.name.rpartition(".")[2] for linear in group))
        is_writer = writer is not None and group[0] is writer and not first
        recorded = [writer] if refit and writer is not None and first else []
        target = targets.pop(writer.name, None) if is_writer and writer is not None else None
        moments = _moments(task, group[0], weights, target, recorded, targets)
        for linear in group:
            solve(linear, moments, refit_damping)
        if writer is not None and group[0] is writer:
            entered = position + 1
    if steps:
        with task.clock.phase("prune/refine"):
            reconstruct(task, dense_outputs, weights, steps=steps, learning_rate=learning_rate)


def _solve(task: BlockTask, solver: Solver, linear: LinearView, moments: _Moments, damping: float) -> None:
    dense = linear.weight()
    wanted = dense
    notes: tuple[str, ...] = ()
    with task.clock.phase("prune/solve"):
        if moments.cross is not None:
            fit = least_squares(moments.gram, moments.cross, damping, prior=dense)
            wanted, notes = fit.weight, fit.notes
        solution = solver(wanted, moments.gram, task.patterns[linear.name])
    task.accept(linear, Solution(solution.weight, solution.mask, solution.error, (*notes, *solution.notes)))


def token_weights(hidden: list[Tensor], medians: float) -> list[Tensor]:
    """``min(1, (medians · median norm / norm)²)`` for each token: a few tokens with massive activations (2402.17762)
    would otherwise be all that a squared error sees.

    Args:
        hidden: batches ``(batch, seq, hidden)``.
        medians: norms up to so many times the median count fully.

    Returns:
        Weights ``(batch, seq)`` for each batch.
    """
    norms = [batch.float().norm(dim=-1) for batch in hidden]
    limit = medians * torch.cat([norm.flatten() for norm in norms]).median()
    return [(limit / norm.clamp(min=1e-30)).square().clamp(max=1.0) for norm in norms]


def _groups(task: BlockTask) -> list[list[LinearView]]:
    """The groups of linears that share an input, from one window."""
    grouping = InputGroups()
    hidden, call = next(task.stream.batches(task.index))

    def see(linear: LinearView, entering: Tensor, leaving: Tensor) -> None:
        grouping.add(linear, entering)

    with watch(task.linears, see):
        task.stream.chain.run(task.index, hidden, call)
    return grouping.groups


def _moments(
    task: BlockTask,
    head: LinearView,
    weights: list[Tensor] | None,
    target: list[Tensor] | None,
    recorded: list[LinearView],
    targets: dict[str, list[Tensor]],
) -> _Moments:
    """One pass: moments of the input of ``head``, and what the ``recorded`` linears give, kept as ``targets``."""
    device = task.stream.chain.device
    gram = GramAccumulator(head.in_features, device)
    cross = CrossAccumulator(head.out_features, head.in_features, device) if target is not None else None
    position = 0

    def see(linear: LinearView, entering: Tensor, leaving: Tensor) -> None:
        if linear is head:
            token_weights = weights[position] if weights is not None else None
            gram.update(entering, token_weights)
            if cross is not None and target is not None:
                wanted = target[position]
                bias = linear.bias
                cross.update(wanted if bias is None else wanted - bias, entering, token_weights)
        if linear in recorded:
            targets.setdefault(linear.name, []).append(leaving.detach())

    with task.clock.phase("prune/statistics"), watch([head, *(x for x in recorded if x is not head)], see):
        for position in range(len(task.stream)):  # the hook reads where the pass is
            task.stream.run_batch(task.index, position)
    return _Moments(gram.finish(), cross.finish() if cross is not None else None)
