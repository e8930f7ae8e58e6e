"""Pruning a block's feed-forward units by auxiliary variables: the code that two methods share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from torch import Tensor

from sparsellm.method.auxiliary.loop import LoopSettings, prune_feed_forward
from sparsellm.method.auxiliary.objective import (
    Chunks,
    FeedForward,
    Linear,
    split,
    stored,
)
from sparsellm.method.blocks.task import BlockTask, naming
from sparsellm.method.solvers import Solution, Solver
from sparsellm.model import LinearView
from sparsellm.model.capture import watch
from sparsellm.model.units import FeedForwardUnit

# the unit of a block, before it is read into tensors
Unit = FeedForwardUnit[LinearView]


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
        flat = [weight.flatten() for weight in weights] if weights is not None else None
        train, held_out = split(stored(inputs, outputs, flat))
        alternate(
            task,
            unit,
            train=train,
            held_out=held_out,
            solvers=solvers,
            settings=settings,
        )


def alternate(
    task: BlockTask,
    unit: Unit,
    train: Chunks,
    held_out: Chunks,
    solvers: Mapping[str, Solver],
    settings: LoopSettings,
) -> None:
    """Runs the loop with a solver for each linear, by name, and accepts its results; ``down`` gets the history."""
    linears = unit.linears()
    scratch = task.stream.scratch
    inside = {
        role: partial(solvers[x.name], pattern=task.patterns[x.name])
        for role, x in linears.items()
    }
    with naming(unit.down.name):
        pruned, history = prune_feed_forward(
            current(unit), train, held_out, inside, settings, scratch
        )
    for role, linear in pruned.unit.linears().items():
        mask = pruned.masks[role]
        if task.patterns[linears[role].name].sparsity < 1 and not bool(
            linear.weight.any()
        ):
            continue  # its inputs were 0 in every token
        error = pruned.error if role == "down" else math.nan  # it is the unit's
        solution = Solution(linear.weight.where(mask, 0.0), mask, error, pruned.notes)
        steps = tuple(history) if role == "down" else ()
        task.accept(linears[role], solution.weight, solution, None, steps)
        linears[role].assign_bias(linear.bias)


def current(unit: Unit) -> FeedForward:
    """The current weights of the unit, as plain tensors."""
    linears = {
        role: Linear(linear.weight(), linear.bias)
        for role, linear in unit.linears().items()
    }
    return FeedForward(
        linears["up"], linears["down"], unit.activation, linears.get("gate")
    )
