"""The feed-forward units of a block: which are pruned by auxiliary variables, and how, for two methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from sparsellm import parallel
from sparsellm.method.auxiliary.loop import LoopSettings, prune_feed_forward
from sparsellm.method.auxiliary.objective import (
    Chunks,
    FeedForward,
    Linear,
    split,
    stored,
)
from sparsellm.method.blocks.statistics import naming
from sparsellm.method.blocks.sublayers import Sublayer
from sparsellm.method.blocks.task import BlockTask
from sparsellm.method.solvers import Solution, Solver
from sparsellm.model import LinearView
from sparsellm.model.capture import watch
from sparsellm.model.units import Unit, find_feed_forward, relu
from sparsellm.patterns import NM, Pattern
from sparsellm.records import Iteration

ROUNDS = 2  # alternations of the auxiliary variables, where they pay; four and eight gain no more
PAYS = 0.75  # sparsity from which they do


def units_to_alternate(
    task: BlockTask, sublayers: Sequence[Sublayer], solver: str, asked: int | None
) -> dict[int, tuple[Unit, int]]:
    """The units that auxiliary variables prune, each with its alternations, by the number of the sublayer that it is.

    As many alternations as ``asked`` for, or, for None, by the solver and the sparsity. In a ReLU model the variables
    pay from ``PAYS`` on, unstructured with SparseGPT inside and in N:M with ADMM inside (docs/results.md, *What the
    auxiliary variables are worth*); in gated units they gain nothing."""
    sparsest = max(task.patterns[linear.name].sparsity for linear in task.linears)
    if asked == 0 or (asked is None and sparsest < PAYS):
        return {}
    chosen: dict[int, tuple[Unit, int]] = {}
    for unit in find_feed_forward(task.linears, task.stream, task.index):
        linears = unit.linears().values()
        fits = unit.gate is None and unit.activation is relu
        if asked is None:
            patterns = [task.patterns[linear.name] for linear in linears]
            if not fits or not _pay(solver, patterns):
                continue
        names = {linear.name for linear in linears}
        for place, sublayer in enumerate(sublayers):
            if not names <= sublayer.names:
                continue
            if not fits:
                why = ", which are for two-layer ReLU units"
            elif asked is None and parallel.size() > 1:
                why = ", which work in one process only"
            elif names < sublayer.names:
                # the rest of attention is there too where its writer stays dense
                why = ": its sublayer has other linears"
            else:
                chosen[place] = unit, asked or ROUNDS
                continue
            task.note(unit.down, f"pruned without auxiliary variables{why}")
    return chosen


def _pay(solver: str, patterns: Sequence[Pattern]) -> bool:
    """Whether auxiliary variables pay in a two-layer ReLU unit with these patterns."""
    sparsity = sum(pattern.sparsity for pattern in patterns) / len(patterns)
    if sparsity < PAYS:
        return False
    if all(isinstance(pattern, NM) for pattern in patterns):
        return solver == "admm"
    return solver == "sparsegpt"


def prune_unit(
    task: BlockTask,
    unit: Unit,
    weights: list[Tensor] | None,
    solvers: Mapping[str, Solver],
    settings: LoopSettings,
) -> None:
    """Prunes one unit of a block; the targets are its current outputs, with weights of tokens ``(batch, seq)`` or None.
    The result is the iterate with the least error on held-out tokens, with its weights then fitted to all tokens."""
    task.report("variables")
    with (
        task.clock.phase("prune/variables"),
        task.stream.store() as inputs,
        task.stream.store() as outputs,
    ):

        def see(linear: LinearView, x: Tensor, y: Tensor) -> None:
            if linear is unit.up:
                inputs.append(x.detach().flatten(0, -2).clone())
            if linear is unit.down:
                outputs.append(y.detach().flatten(0, -2).clone())

        with watch([unit.up, unit.down], see):
            for _ in task.stream.run(task.index):
                pass
        flat = None
        if weights is not None:
            flat = [weight.flatten() for weight in weights]
        train, held_out = split(stored(inputs, outputs, flat))
        alternate(task, unit, train, held_out, solvers=solvers, settings=settings)


def alternate(
    task: BlockTask,
    unit: Unit,
    train: Chunks,
    held_out: Chunks,
    solvers: Mapping[str, Solver],
    settings: LoopSettings,
) -> None:
    """Runs the loop with a solver for each linear, by name, and assigns its results. The history goes to ``down``."""
    linears = unit.linears()
    inside = {
        role: partial(solvers[x.name], pattern=task.patterns[x.name])
        for role, x in linears.items()
    }
    with naming(unit.down.name):
        pruned, history = prune_feed_forward(
            current(unit), train, held_out, inside, settings, task.stream.scratch
        )
    for role, result in pruned.unit.linears().items():
        linear = linears[role]
        mask = pruned.masks[role]
        if task.patterns[linear.name].sparsity < 1 and not bool(result.weight.any()):
            continue  # its inputs were 0 in every token
        error = math.nan
        steps: tuple[Iteration, ...] = ()
        if role == "down":  # the error is the unit's
            error = pruned.error
            steps = tuple(history)
        weight = result.weight.where(mask, 0.0)
        solution = Solution(weight, mask, error, pruned.notes)
        task.accept(linear, weight, solution, gram=None, history=steps)
        linear.assign_bias(result.bias)


def current(unit: Unit) -> FeedForward:
    """The current weights of the unit, as plain tensors."""
    linears = {
        role: Linear(linear.weight(), linear.bias)
        for role, linear in unit.linears().items()
    }
    return FeedForward(
        linears["up"], linears["down"], unit.activation, linears.get("gate")
    )
