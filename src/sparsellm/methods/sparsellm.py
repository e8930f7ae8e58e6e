"""One block as coordinated small problems: each linear is fitted to what the pruned ones before it really produce.

Within a block the groups of linears that share an input are pruned in the order in which they run (q,k,v → o →
up,gate → down), and the block runs again after each, so that every statistic is of what the linear will really be
given. The last linear of each sublayer, the one that writes into the residual stream, is first fitted by least squares
to what the sublayer gave before its first linear was pruned; so it makes up for what they lost. Then the kept weights
of the block are polished together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from sparsellm import parallel
from sparsellm.chain import LinearView
from sparsellm.chain.capture import InputGroups, watch
from sparsellm.chain.units import FeedForwardUnit, find_feed_forward
from sparsellm.decomposition import Chunk, FeedForward, Linear, Settings, prune_feed_forward, split
from sparsellm.errors import RecipeError
from sparsellm.methods.base import METHODS, BlockTask
from sparsellm.refine.reconstruct import reconstruct
from sparsellm.solvers import SOLVERS, Solution, Solver
from sparsellm.solvers.divided import divide
from sparsellm.statistics import CrossAccumulator, Gram, GramAccumulator, least_squares


@dataclass
class _Moments:
    """Of one group: the Gram matrix of its input, and the cross moment with the target if there is one."""

    gram: Gram
    cross: Tensor | None


@METHODS.register(
    "sparsellm",
    paper="arXiv 2402.17946, with the solver of 2406.07831 and the refinement of 2510.14444",
    distributed=True,
)
def sparsellm(
    task: BlockTask,
    *,
    solver: Annotated[str, "the local solver inside"] = "admm",
    refit: Annotated[bool, "fit the last linear of each sublayer to the dense sublayer's output"] = True,
    refit_damping: Annotated[float, Field(ge=0), "ridge of that fit towards the dense weight"] = 0.1,
    norm_weighting: Annotated[
        float, Field(ge=0), "tokens of a norm above so many medians count less; 0: all count"
    ] = 1.5,
    iterations: Annotated[int, Field(ge=0), "alternations of the feed-forward unit's auxiliary variables"] = 0,
    steps: Annotated[int, Field(ge=0), "steps of Adam on the kept weights of each block"] = 48,
    learning_rate: Annotated[float, Field(gt=0), "of Adam, relative to the weights' root mean square"] = 0.02,
) -> None:
    """Global pruning by auxiliary targets: linears in the order they run, each fitted to what is left to it."""
    if not any(task.patterns[linear.name].sparsity for linear in task.linears):
        return  # nothing is lost, so nothing is to be made up for: every bit stays
    if iterations and parallel.size() > 1:
        raise RecipeError("iterations of the auxiliary variables run in one process; start it without torchrun")
    weights = token_weights(task.stream.hidden, norm_weighting) if norm_weighting else None
    with task.clock.phase("prune/targets"):
        dense_outputs = list(task.stream.run(task.index)) if steps else []
    units = {unit.down.name: unit for unit in find_units(task)} if iterations else {}
    for sublayer in _sublayers(_groups(task), task.stream.hidden[0].shape[-1]):
        unit = units.get(sublayer[-1][0].name)
        if unit is not None and all(linear in unit.linears() for group in sublayer for linear in group):
            with task.clock.phase("prune/variables"):
                prune_unit(task, unit, weights, divide(SOLVERS[solver]), iterations)
        else:
            _prune_in_order(task, sublayer, weights, divide(SOLVERS[solver]), refit, refit_damping)
    if steps:
        with task.clock.phase("prune/refine"):
            reconstruct(task, dense_outputs, weights, steps=steps, learning_rate=learning_rate)


def _sublayers(groups: list[list[LinearView]], width: int) -> list[list[list[LinearView]]]:
    """The groups cut after each writer: a linear alone on its input that gives vectors of the stream's width."""
    sublayers: list[list[list[LinearView]]] = [[]]
    for group in groups:
        sublayers[-1].append(group)
        if len(group) == 1 and group[0].out_features == width and len(sublayers[-1]) > 1:
            sublayers.append([])
    return [sublayer for sublayer in sublayers if sublayer]


def _prune_in_order(
    task: BlockTask,
    sublayer: list[list[LinearView]],
    weights: list[Tensor] | None,
    solver: Solver,
    refit: bool,
    damping: float,
) -> None:
    writer = sublayer[-1][0]
    targets: dict[str, list[Tensor]] = {}
    for position, group in enumerate(sublayer):
        task.report("+".join(linear.name.rpartition(".")[2] for linear in group))
        recorded = [writer] if refit and position == 0 and len(sublayer) > 1 else []
        target = targets.pop(writer.name, None) if group[0] is writer else None
        moments = _moments(task, group[0], weights, target, recorded, targets)
        for linear in group:
            _solve(task, solver, linear, moments, damping)


def prune_unit(
    task: BlockTask, unit: FeedForwardUnit, weights: list[Tensor] | None, solver: Solver, iterations: int
) -> None:
    """The auxiliary variables of one feed-forward unit: targets are what the dense unit gives on the pruned stream.

    Iteration 0 is the local solution with ``down`` refitted; the iterate with the least error on held-out tokens wins,
    and its weights are then fitted to all tokens. The history goes into the record of ``down``.
    """
    task.report("variables")
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def see(linear: LinearView, entering: Tensor, leaving: Tensor) -> None:
        if linear is unit.up:
            inputs.append(entering.detach().flatten(0, -2))
        if linear is unit.down:
            outputs.append(leaving.detach().flatten(0, -2))

    with watch([unit.up, unit.down], see):
        task.run()
    chunks = [
        Chunk(x, y, weights[index].flatten() if weights is not None else None)
        for index, (x, y) in enumerate(zip(inputs, outputs, strict=True))
    ]
    train, held_out = split(chunks)
    dense, roles = feed_forward_of(unit)
    patterns = {role: task.patterns[linear.name] for role, linear in roles.items()}
    settings = Settings(iterations=iterations, mask_only=True, refit="all")
    result = prune_feed_forward(dense, train, held_out, solver, patterns, settings)
    for role, pruned in result.unit.linears().items():
        linear = roles[role]
        weight = torch.where(result.masks[role], pruned.weight, 0.0)
        notes = result.history[result.best_iteration].notes
        task.accept(linear, Solution(weight, result.masks[role], result.error, notes))
        if pruned.bias is not None:
            linear.assign_bias(pruned.bias)
    task.history[unit.down.name] = [
        {
            "iteration": record.iteration,
            "held_out_error": record.held_out_error,
            "train_error": record.train_error,
            "objective": record.terms.total if record.terms is not None else None,
            "chosen": record.iteration == result.best_iteration,
        }
        for record in result.history
    ]


def feed_forward_of(unit: FeedForwardUnit) -> tuple[FeedForward, dict[str, LinearView]]:
    """The unit as plain tensors, and its linears by role."""
    roles = {"up": unit.up, "down": unit.down, **({"gate": unit.gate} if unit.gate is not None else {})}
    plain = {role: Linear(linear.weight(), linear.bias) for role, linear in roles.items()}
    return FeedForward(plain["up"], plain["down"], unit.activation, plain.get("gate")), roles


def find_units(task: BlockTask) -> list[FeedForwardUnit]:
    """The feed-forward units of the block, from one batch."""
    return find_feed_forward(task.linears, lambda: task.stream.run_batch(task.index, 0))


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
    limit = medians * torch.cat(parallel.gather_list(torch.cat([norm.flatten() for norm in norms]))).median()
    return [(limit / norm.clamp(min=1e-30)).square().clamp(max=1.0) for norm in norms]


def _groups(task: BlockTask) -> list[list[LinearView]]:
    """The groups of linears that share an input, from one batch."""
    grouping = InputGroups()

    def see(linear: LinearView, entering: Tensor, leaving: Tensor) -> None:
        grouping.add(linear, entering)

    with watch(task.linears, see):
        task.stream.run_batch(task.index, 0)
    return grouping.agreed(task.linears)


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
        gram.reduce()
        if cross is not None:
            cross.reduce()
    return _Moments(gram.finish(), cross.finish() if cross is not None else None)
