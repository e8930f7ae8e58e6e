"""The auxiliary variables of a block's feed-forward units: what both methods that use them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparsellm.chain import LinearView
from sparsellm.chain.capture import watch
from sparsellm.chain.units import FeedForwardUnit, find_feed_forward
from sparsellm.decomposition import Chunk, FeedForward, Linear, Settings, StoredChunks, prune_feed_forward, split
from sparsellm.methods.base import BlockTask
from sparsellm.solvers import Solution, Solver


def prune_unit(
    task: BlockTask,
    unit: FeedForwardUnit,
    weights: list[Tensor] | None,
    solvers: Mapping[str, Solver],
    iterations: int,
) -> None:
    """The auxiliary variables of one feed-forward unit: targets are what the dense unit gives on the pruned stream.

    Iteration 0 is the local solution with ``down`` refitted; the iterate with the least error on held-out tokens wins,
    and its weights are then fitted to all tokens. The history goes into the record of ``down``.
    """
    task.report("variables")
    with task.stream.store() as inputs, task.stream.store() as outputs:

        def see(linear: LinearView, entering: Tensor, leaving: Tensor) -> None:
            if linear is unit.up:
                inputs.append(entering.detach().flatten(0, -2).clone())
            if linear is unit.down:
                outputs.append(leaving.detach().flatten(0, -2).clone())

        with watch([unit.up, unit.down], see):
            task.run()
        flat = [weight.flatten() for weight in weights] if weights is not None else None
        train, held_out = split(StoredChunks(inputs, outputs, flat))
        _alternate(task, unit, train, held_out, solvers, iterations)


def _alternate(
    task: BlockTask,
    unit: FeedForwardUnit,
    train: Sequence[Chunk],
    held_out: Sequence[Chunk],
    solvers: Mapping[str, Solver],
    iterations: int,
) -> None:
    dense, roles = feed_forward_of(unit)
    patterns = {role: task.patterns[linear.name] for role, linear in roles.items()}
    settings = Settings(
        iterations=iterations,
        mask_only=True,
        refit="all",
    )
    by_role = {role: solvers[linear.name] for role, linear in roles.items()}
    result = prune_feed_forward(dense, train, held_out, by_role, patterns, settings)
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
    """The feed-forward units of the block, from one window."""
    return find_feed_forward(task.linears, lambda: task.stream.run_window(task.index))
