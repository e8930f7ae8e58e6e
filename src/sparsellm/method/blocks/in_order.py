"""SparseLLM: prunes the linears of a block in the order in which they run, each fitted to the outputs of those before.

1. The groups of linears that share an input are pruned in the order in which they run (q,k,v → o → up,gate → down).
   The block runs again before each group, so every statistic is of the inputs that the pruned model produces.
2. The last linear of a sublayer is its output projection (the *writer*), which adds to the residual stream. It is
   refitted before it is pruned: least squares towards the output that the sublayer had before any of its linears was
   pruned. So it compensates the errors of the other linears.
3. Instead of 1 and 2, a two-layer ReLU unit is pruned by its auxiliary variables where that pays: at high sparsity, or
   where ``options.iterations`` asks for it.
4. After all blocks, the run sweeps the whole model towards the dense model's predictions (``effort``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from sparsellm import parallel
from sparsellm.errors import RecipeError
from sparsellm.files.scratch import TensorStore
from sparsellm.method.auxiliary.loop import LoopSettings
from sparsellm.method.blocks.channels import find_channels
from sparsellm.method.blocks.feed_forward import Unit, prune_unit
from sparsellm.method.blocks.permutation import permute_block
from sparsellm.method.blocks.rotation import rotate_block
from sparsellm.method.blocks.routed import prune_experts, without_experts
from sparsellm.method.blocks.sublayers import Sublayer, find_sublayers
from sparsellm.method.blocks.task import METHODS, BlockTask, Group, naming
from sparsellm.method.blocks.weighting import token_weights, weighted_solvers
from sparsellm.method.gram import (
    CrossAccumulator,
    Fit,
    Gram,
    GramAccumulator,
    least_squares,
)
from sparsellm.method.solvers import SOLVERS, Solver
from sparsellm.model import LinearView
from sparsellm.model.capture import RunOrder, skipping, watch
from sparsellm.model.shortcuts import KnownOutput
from sparsellm.model.units import find_feed_forward, relu
from sparsellm.patterns import NM
from sparsellm.registry import Needs, Options

ROUNDS = 2  # alternations of the auxiliary variables, where they pay; four and eight gain no more
PAYS = 0.75  # sparsity from which they do


def _needs(options: Options) -> Needs:
    if options["iterations"] and not options["refit"]:
        raise RecipeError(
            "options.iterations of sparsellm includes the refit; leave options.refit at true"
        )
    solver = SOLVERS[options["solver"]]
    weighted = options["output_metric"] > 0
    if needed := [
        name
        for name, option in solver.options.model_fields.items()
        if option.is_required()
    ]:
        raise RecipeError(
            f"sparsellm runs solver {solver.name} with its defaults; give its option {needed[0]} one"
        )
    alone = "iterations" if options["iterations"] else ""
    return Needs(output_costs=weighted, token_states=True, one_process=alone)


@METHODS.register(
    "sparsellm",
    paper="arXiv 2402.17946, with the solver of 2406.07831",
    needs=_needs,
    distributed=True,
    allocation="threshold",
    effort=1,
)
def prune_in_order(
    task: BlockTask,
    *,
    solver: Annotated[str, "the local solver inside"] = "admm",
    refit: Annotated[
        bool, "fit the last linear of each sublayer to the dense sublayer's output"
    ] = True,
    refit_damping: Annotated[
        float, Field(ge=0), "ridge of that fit towards the dense weight"
    ] = 0.1,
    output_metric: Annotated[
        float,
        Field(ge=0, le=1),
        "exponent of E[g²] in the weights of outputs; 0: equal weights",
    ] = 0.5,
    norm_weighting: Annotated[
        float,
        Field(ge=0),
        "tokens whose norm is above this many medians get less weight; 0: equal weights",
    ] = 1.5,
    symmetries: Annotated[
        Literal["none", "permute", "rotate"],
        "N:M: permute inputs so that the largest weights do not share a group; and rotate attention's values first",
    ] = "rotate",
    iterations: Annotated[
        int | None,
        Field(ge=0),
        "alternations of the auxiliary variables of two-layer ReLU units; null: 2 where they pay",
    ] = None,
) -> None:
    """Global pruning by auxiliary targets: linears in order, each sublayer's last one refitted to its dense output."""
    if task.idle:
        return  # without zeros there is no error to compensate: the weights keep every bit
    task.stream.forget()
    weights = (
        token_weights(task.stream.hidden, norm_weighting) if norm_weighting else None
    )
    channels = find_channels(task) if symmetries != "none" else []
    if symmetries == "rotate":
        rotate_block(task, channels, weights)
    permute_block(task, channels, weights)
    order = RunOrder()
    sublayers = find_sublayers(task, order)
    solvers = weighted_solvers(task, solver, output_metric)
    fitting = _Fitting(task, weights, solvers, refit_damping if refit else None, order)
    sparsest = max(task.patterns[linear.name].sparsity for linear in task.linears)
    units: list[Unit] = []
    if iterations or (iterations is None and refit and sparsest >= PAYS):
        units = find_feed_forward(
            task.linears, lambda: task.stream.run_window(task.index)
        )
    by_names = {
        frozenset(linear.name for linear in unit.linears().values()): unit
        for unit in units
    }
    # the rest of attention is in a unit's sublayer where its writer stays dense
    for (
        names,
        layers,
    ) in by_names.items():
        if any(names < sublayer.names for sublayer in sublayers) and _rounds(
            task, layers, solver, iterations
        ):
            task.note(
                layers.down,
                "pruned without auxiliary variables: its sublayer has other linears",
            )
    for sublayer in sublayers:
        unit = by_names.get(frozenset(sublayer.names))
        if unit is not None and (rounds := _rounds(task, unit, solver, iterations)):
            prune_unit(
                task,
                unit,
                weights,
                solvers,
                LoopSettings(rounds, damping=refit_damping),
            )
        else:
            fitting.prune_sublayer(sublayer)
    prune_experts(task, fitting.solve, weights, fitting.damping)
    known = {name for sublayer in sublayers for name in sublayer.names}
    rest = [
        linear for linear in without_experts(task.linears) if linear.name not in known
    ]
    if rest:  # those that do not get every token
        task.prune_each(task.statistics(rest, weights), fitting.solve)


def _rounds(task: BlockTask, unit: Unit, solver: str, asked: int | None) -> int:
    """Alternations of a unit: ``asked`` for, or None for a choice by the solver and the sparsity.

    In a ReLU model the variables pay from :data:`PAYS` on, unstructured with SparseGPT inside and in N:M with ADMM
    inside (docs/results.md, *What the auxiliary variables are worth*); in gated units they gain nothing."""
    if unit.gate is not None or unit.activation is not relu:
        if asked:
            task.note(
                unit.down,
                "pruned without auxiliary variables, which are for two-layer ReLU units",
            )
        return 0
    if asked is not None:
        return asked
    patterns = [task.patterns[linear.name] for linear in unit.linears().values()]
    sparsity = sum(pattern.sparsity for pattern in patterns) / len(patterns)
    fixed = all(isinstance(pattern, NM) for pattern in patterns)
    if sparsity < PAYS or (solver, fixed) not in (("sparsegpt", False), ("admm", True)):
        return 0
    if parallel.size() > 1:
        task.note(
            unit.down,
            "pruned without auxiliary variables, which work in one process only",
        )
        return 0
    return ROUNDS


class _Means:
    """Weighted means over tokens of the inputs of a group of linears and, if its linear is fitted, of the targets. From
    them follows the bias that makes up for the change of the mean output. Without a bias nothing is summed."""

    def __init__(
        self, group: Sequence[LinearView], fitted: bool, device: torch.device
    ) -> None:
        head = group[0]
        biased = any(linear.bias is not None for linear in group)
        sizes = (
            [1, head.in_features, *([head.out_features] if fitted else [])]
            if biased
            else []
        )
        # weights, inputs and targets
        self._sums = [CrossAccumulator(1, size, device) for size in sizes]

    def update(self, x: Tensor, target: Tensor | None, weights: Tensor | None) -> None:
        ones = x.new_ones(*x.shape[:-1], 1)
        for total, values in zip(self._sums, (ones, x, target), strict=False):
            if values is not None:
                total.update(ones, values, weights)

    def reduce(self) -> None:
        for total in self._sums:
            total.reduce()

    @contextmanager
    def kept(self, linear: LinearView) -> Iterator[None]:
        """In the context the weight changes; its end sets the bias: the mean output stays, or becomes the target's."""
        if linear.bias is None:
            yield
            return
        weight, *means = (total.finish()[0] for total in self._sums)
        inputs, *targets = (mean / weight for mean in means)
        goal = targets[0] if targets else linear.bias + linear.weight() @ inputs
        yield
        linear.assign_bias(goal - linear.weight() @ inputs)


@dataclass(frozen=True)
class _Fitting:
    """Fits and prunes linears of a block."""

    task: BlockTask
    # weights of tokens, batches (batch, seq); None for equal ones
    weights: list[Tensor] | None
    solvers: Mapping[str, Solver]  # for each linear, by name
    damping: float | None  # ridge of the refit of output projections; None for no refit
    order: RunOrder  # in which the block's linears run

    def solve(self, linear: LinearView, gram: Gram, fit: Fit | None = None) -> None:
        """Prunes the weight of a linear, or its refitted weight if there is one, and assigns the result."""
        self.task.solve(linear, self.solvers[linear.name], gram, fit)

    def prune_sublayer(self, sublayer: Sublayer) -> None:
        """Prunes one group after another; the refit's target is the writer's output before the first was pruned."""
        task = self.task
        stream = self.task.stream
        before = [
            linear
            for group in sublayer.groups
            for linear in group
            if linear is not sublayer.writer
        ]
        changed = any(map(task.changes, before))
        writer = sublayer.writer if self.damping is not None and changed else None
        with stream.store() as target:  # batches of the writer's output before pruning
            for group in sublayer.groups:
                task.report(
                    "+".join(linear.name.rpartition(".")[2] for linear in group)
                )
                known = sublayer.shortcut if group[0] is sublayer.writer else None
                known = stream.keep(known) if known is not None else None
                recorded = writer if group is sublayer.groups[0] else None
                gram, crosses, means = self._moments(
                    group, target, known, recorded, fitted=group[0] is writer
                )
                task.prune_each(
                    [(group, gram)], partial(self._prune, crosses=crosses, means=means)
                )
                if known is not None:
                    stream.use(known)

    def _prune(
        self, linear: LinearView, gram: Gram, crosses: dict[str, Tensor], means: _Means
    ) -> None:
        """Fits a linear to its target if it has a cross-moment, which is freed, prunes it and sets its bias."""
        task = self.task
        fit = None
        if linear.name in crosses and self.damping is not None:
            cross = crosses.pop(linear.name)
            with task.clock.phase("prune/solve"), naming(linear.name):
                fit = least_squares(gram, cross, self.damping, prior=linear.weight())
            del cross
        moved = fit is not None or task.changes(linear)
        with means.kept(linear) if moved else nullcontext():
            self.solve(linear, gram, fit)

    def _moments(
        self,
        group: Group,
        target: TensorStore,
        known: KnownOutput | None,
        recorded: LinearView | None,
        *,
        fitted: bool,
    ) -> tuple[Gram, dict[str, Tensor], _Means]:
        """The Gram matrix of the input of a group, its cross-moment with the target ``(out, in)``, by the name of the
        linear, if that is fitted, and its means.

        They take one pass, which also appends that input to ``known`` and the outputs of ``recorded`` to ``target``.
        Linears that only run after both are skipped."""
        stream = self.task.stream
        index = self.task.index
        head = group[0]
        means = _Means(group, fitted, stream.chain.device)
        gram = GramAccumulator(head.in_features, stream.chain.device)
        cross = (
            CrossAccumulator(head.out_features, head.in_features, stream.chain.device)
            if fitted
            else None
        )
        bias = head.bias
        position = 0  # the number of the batch, read by the hook

        def see(linear: LinearView, x: Tensor, y: Tensor) -> None:
            if linear is head:
                weights = self.weights[position] if self.weights is not None else None
                if known is not None:
                    known.values.append(x.detach().clone())
                gram.update(x, weights)
                # read once: it may be on a disk
                goal = target[position] if fitted else None
                means.update(x, goal, weights)
                if cross is not None and goal is not None:
                    cross.update(goal if bias is None else goal - bias, x, weights)
            if linear is recorded:
                # later operations may change it in place
                target.append(y.detach().clone())

        outputs = [recorded] if recorded is not None else []
        unread = self.order.unread(
            stream.chain.linears(index), inputs=[head], outputs=outputs
        )
        with (
            self.task.clock.phase("prune/statistics"),
            watch([head, *outputs], see),
            skipping(unread),
        ):
            for position in range(len(stream)):
                stream.run_batch(index, position)
        gram.reduce()
        means.reduce()
        if cross is not None:
            cross.reduce()
        with naming(head.name):
            finished = gram.finish()
            crosses = {head.name: cross.finish()} if cross is not None else {}
            return finished, crosses, means
