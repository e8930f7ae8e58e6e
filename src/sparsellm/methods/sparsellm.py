"""One block as coordinated small problems: each linear is fitted to what the pruned ones before it really produce.

Within a block the groups of linears that share an input are pruned in the order in which they run (q,k,v → o →
up,gate → down), and the block runs again after each, so that every statistic is of what the linear will really be
given. The last linear of each sublayer, the one that writes into the residual stream, is first fitted by least squares
to what the sublayer gave before its first linear was pruned; so it makes up for what they lost. Then the kept weights
of the block are polished together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from sparsellm.chain import LinearView
from sparsellm.chain.capture import InputGroups, watch
from sparsellm.chain.units import FeedForwardUnit, find_feed_forward
from sparsellm.decomposition import Chunk, FeedForward, Linear, Settings, prune_feed_forward, split
from sparsellm.methods.base import METHODS, BlockTask
from sparsellm.refine.reconstruct import reconstruct
from sparsellm.registry import Needs, Workspace
from sparsellm.solvers import SOLVERS, Solution, Solver
from sparsellm.statistics import CrossAccumulator, Gram, GramAccumulator, least_squares

SWEEP_RATE = 0.003


@dataclass
class _Moments:
    """Of one group: the Gram matrix of its input, and the cross moment with the target if there is one."""

    gram: Gram
    cross: Tensor | None


@dataclass(frozen=True)
class Effort:
    """What one step of effort buys. Each number is measured in docs/results.md."""

    steps: int  # of Adam in each block
    passes: int  # over the calibration windows, of the whole model at the end


EFFORTS = (Effort(0, 0), Effort(0, 2), Effort(64, 4), Effort(128, 12))


def _needs(options: dict[str, Any]) -> Needs:
    effort = EFFORTS[options.get("effort", 1)]
    passes = options.get("passes")
    passes = effort.passes if passes is None else passes
    two = passes > 0 or any(options.get(name, 0.0) > 0 for name in ("blend", "residual", "refine_blend"))
    return Needs(dense_stream=two, passes=passes, learning_rate=options.get("sweep_rate", SWEEP_RATE))


@METHODS.register(
    "sparsellm",
    paper="arXiv 2402.17946, with the solver of 2406.07831 and the refinement of 2510.14444",
    needs=_needs,
    workspace=Workspace(blocks=5.0, streams=2),
)
def sparsellm(
    task: BlockTask,
    *,
    effort: Annotated[int, Field(ge=0, le=3), "time to spend: 0 solves only, 3 refines longest"] = 1,
    solver: Annotated[str, "the local solver inside"] = "admm",
    refit: Annotated[bool, "fit the last linear of each sublayer to the dense sublayer's output"] = True,
    refit_damping: Annotated[float, Field(ge=0), "ridge of that fit towards the dense weight"] = 0.1,
    blend: Annotated[
        float, Field(ge=0, le=1), "how far targets of that fit are the dense model's own activations"
    ] = 0.0,
    residual: Annotated[float, Field(ge=0, le=1), "share of the residual stream's own error in those targets"] = 0.0,
    norm_weighting: Annotated[
        float, Field(ge=0), "tokens of a norm above so many medians count less; 0: all count"
    ] = 1.5,
    iterations: Annotated[int, Field(ge=0), "alternations of the feed-forward unit's auxiliary variables"] = 0,
    steps: Annotated[int | None, "steps of Adam on the kept weights of each block; null: by effort"] = None,
    learning_rate: Annotated[float, Field(gt=0), "of those, relative to the weights' root mean square"] = 0.003,
    refine_blend: Annotated[
        float, Field(ge=0, le=1), "how far their targets are the dense model's hidden states"
    ] = 0.0,
    passes: Annotated[int | None, "sweeps of the whole model at the end; null: by effort"] = None,
    sweep_rate: Annotated[float, Field(gt=0), "learning rate of the sweeps"] = SWEEP_RATE,
) -> None:
    """Global pruning by auxiliary targets: linears in the order they run, each fitted to what is left to it."""
    if not any(task.patterns[linear.name].sparsity for linear in task.linears):
        return  # nothing is lost, so nothing is to be made up for: every bit stays
    steps = EFFORTS[effort].steps if steps is None else steps
    weights = token_weights(task.stream.hidden, norm_weighting) if norm_weighting else None
    with contextlib.ExitStack() as held:
        outputs = None
        if steps or residual:
            outputs = held.enter_context(task.stream.store())
            with task.clock.phase("prune/targets"):
                for position, leaving in enumerate(task.stream.run(task.index)):
                    if refine_blend and task.dense is not None:
                        leaving = leaving.lerp(task.dense.leaving[position], refine_blend)
                    outputs.append(leaving)
        sublayers = _sublayers(_groups(task), task.stream.hidden[0].shape[-1])
        pull = _dense_targets(task, sublayers, blend, residual) if blend or residual else {}
        units = {unit.down.name: unit for unit in find_units(task)} if iterations else {}
        for sublayer in sublayers:
            unit = units.get(sublayer[-1][0].name)
            if unit is not None and all(linear in unit.linears() for group in sublayer for linear in group):
                with task.clock.phase("prune/variables"):
                    prune_unit(task, unit, weights, SOLVERS[solver].function, iterations)
            else:
                _prune_in_order(task, sublayer, weights, SOLVERS[solver].function, refit, refit_damping, pull)
        if steps:
            assert outputs is not None
            task.report("refine")
            with task.clock.phase("prune/refine"):
                looks = reconstruct(task, outputs, weights, steps=steps, learning_rate=learning_rate)
            task.history.setdefault(task.linears[-1].name, []).extend(looks)


@dataclass(frozen=True)
class _Pull:
    """What the dense model's own stream adds to a writer's target, batch by batch: ``blend (T_dense - T) + shift``."""

    blend: float
    dense: list[Tensor]  # what the writer gives in the dense model
    shift: list[Tensor] | None  # the error of the residual stream that the writer adds to, times its coefficient

    def on(self, target: Tensor, position: int) -> Tensor:
        moved = target.lerp(self.dense[position], self.blend) if self.blend else target
        return moved if self.shift is None else moved + self.shift[position]


def _dense_targets(
    task: BlockTask, sublayers: list[list[list[LinearView]]], blend: float, residual: float
) -> dict[str, _Pull]:
    """For each writer, what the dense model gives there on its own hidden states; the block is still dense."""
    assert task.dense is not None
    writers = [sublayer[-1][0] for sublayer in sublayers if len(sublayer) > 1]
    seen: dict[str, list[Tensor]] = {writer.name: [] for writer in writers}
    own: dict[str, list[Tensor]] = {writer.name: [] for writer in writers}

    def record(into: dict[str, list[Tensor]]) -> Callable[[LinearView, Tensor, Tensor], None]:
        return lambda linear, entering, leaving: into[linear.name].append(leaving.detach())

    calls, index = task.stream.calls(task.index), task.index
    with watch(writers, record(seen)):
        for position, hidden in enumerate(task.dense.entering):
            task.stream.chain.run(index, hidden, calls[position])
    shifts: dict[str, list[Tensor] | None] = {writer.name: None for writer in writers}
    if residual:
        errors = [d - p for d, p in zip(task.dense.entering, task.stream.hidden, strict=True)]
        with watch(writers, record(own)):
            leaving = list(task.stream.run(index))
        for writer in writers:
            if writer is writers[-1]:  # beside what the last writer adds, the stream holds the rest of the block
                errors = [
                    (task.dense.leaving[i] - seen[writer.name][i]) - (leaving[i] - own[writer.name][i])
                    for i in range(len(leaving))
                ]
            shifts[writer.name] = [residual * error for error in errors]
    return {writer.name: _Pull(blend, seen[writer.name], shifts[writer.name]) for writer in writers}


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
    pull: dict[str, _Pull],
) -> None:
    writer = sublayer[-1][0]
    targets: dict[str, list[Tensor]] = {}
    for position, group in enumerate(sublayer):
        task.report("+".join(linear.name.rpartition(".")[2] for linear in group))
        recorded = [writer] if refit and position == 0 and len(sublayer) > 1 else []
        target = targets.pop(writer.name, None) if group[0] is writer else None
        if target is not None and writer.name in pull:
            target = [pull[writer.name].on(batch, i) for i, batch in enumerate(target)]
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


def token_weights(hidden: Sequence[Tensor], medians: float) -> list[Tensor]:
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
    """The groups of linears that share an input, from one batch."""
    grouping = InputGroups()

    def see(linear: LinearView, entering: Tensor, leaving: Tensor) -> None:
        grouping.add(linear, entering)

    with watch(task.linears, see):
        task.stream.run_batch(task.index, 0)
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
