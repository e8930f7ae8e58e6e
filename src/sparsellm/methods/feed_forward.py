"""Pruning a block's feed-forward units by auxiliary variables: the code that two methods share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from sparsellm.chain import LinearView
from sparsellm.chain.capture import watch
from sparsellm.chain.units import FeedForwardUnit, find_feed_forward
from sparsellm.decomposition import (
    Chunk,
    FeedForward,
    LazyChunks,
    Linear,
    Result,
    Settings,
    prune_feed_forward,
    split,
)
from sparsellm.methods.task import BlockTask
from sparsellm.records import Step
from sparsellm.solvers import Solution, Solver

# Memory of a unit for all tokens, in units of the hidden states: inputs, targets, and Z (or U and S), four times as
# wide.
UNIT_STREAMS = 10


def find_units(task: BlockTask) -> list[FeedForwardUnit]:
    """The feed-forward units of the block, recognised on one window."""
    return find_feed_forward(task.linears, lambda: task.stream.run_window(task.index))


def prune_unit(
    task: BlockTask,
    unit: FeedForwardUnit,
    weights: list[Tensor] | None,
    solvers: Mapping[str, Solver],
    settings: Settings,
) -> None:
    """Prunes one unit of a block by its auxiliary variables; the targets are its current outputs.

    The result is the iterate with the least error on held-out tokens, with its weights then fitted to all tokens.

    Args:
        weights: of tokens, batches ``(batch, seq)``, or None for equal ones.
        solvers: of each linear, by name.
        settings: of the loop.
    """
    task.report("variables")
    with (
        task.clock.phase("prune/variables"),
        task.stream.store() as inputs,
        task.stream.store() as outputs,
    ):

        def see(linear: LinearView, entering: Tensor, leaving: Tensor) -> None:
            if linear is unit.up:
                inputs.append(entering.detach().flatten(0, -2).clone())
            if linear is unit.down:
                outputs.append(leaving.detach().flatten(0, -2).clone())

        with watch([unit.up, unit.down], see):
            task.run()
        flat = [weight.flatten() for weight in weights] if weights is not None else None
        train, held_out = split(LazyChunks.stored(inputs, outputs, flat))
        alternate(task, unit, train, held_out, solvers, settings)


def alternate(
    task: BlockTask,
    unit: FeedForwardUnit,
    train: Sequence[Chunk],
    held_out: Sequence[Chunk],
    solvers: Mapping[str, Solver],
    settings: Settings,
) -> None:
    """Runs the loop, writes its result to the linears, and adds its history to the record of ``down``."""
    roles = roles_of(unit)
    result = prune_feed_forward(
        plain(unit),
        train,
        held_out,
        {role: solvers[linear.name] for role, linear in roles.items()},
        {role: task.patterns[linear.name] for role, linear in roles.items()},
        settings,
        task.stream.scratch,
    )
    for role, pruned in result.unit.linears().items():
        linear = roles[role]
        weight = pruned.weight.where(result.masks[role], 0.0)
        task.accept(linear, Solution(weight, result.masks[role], result.error, result.history[result.chosen].notes))
        if pruned.bias is not None:
            linear.assign_bias(pruned.bias)
    task.history[unit.down.name] = history_of(result, judged=len(held_out) > 0)


def history_of(result: Result, *, judged: bool) -> list[Step]:
    """One record for each iteration; ``held_out_error`` is None if nothing was held out."""
    return [
        Step(
            iteration=record.iteration,
            held_out_error=record.error if judged else None,
            train_error=record.train_error,
            objective=record.terms.total if record.terms is not None else None,
            chosen=record.iteration == result.chosen,
        )
        for record in result.history
    ]


def roles_of(unit: FeedForwardUnit) -> dict[str, LinearView]:
    """The linears of the unit by role, in the order in which they run."""
    gate = {"gate": unit.gate} if unit.gate is not None else {}
    return {"up": unit.up, **gate, "down": unit.down}


def plain(unit: FeedForwardUnit) -> FeedForward:
    """The current weights of the unit, as plain tensors."""
    linears = {role: Linear(linear.weight(), linear.bias) for role, linear in roles_of(unit).items()}
    return FeedForward(linears["up"], linears["down"], unit.activation, linears.get("gate"))
