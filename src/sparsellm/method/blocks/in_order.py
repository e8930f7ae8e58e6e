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
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from sparsellm.errors import RecipeError
from sparsellm.files.scratch import TensorStore
from sparsellm.method.auxiliary.loop import LoopSettings
from sparsellm.method.blocks.channels import find_channels
from sparsellm.method.blocks.feed_forward import prune_unit, units_to_alternate
from sparsellm.method.blocks.permutation import permute_block
from sparsellm.method.blocks.rotation import rotate_channels
from sparsellm.method.blocks.routed import prune_experts
from sparsellm.method.blocks.statistics import naming
from sparsellm.method.blocks.sublayers import Sublayer, find_sublayers
from sparsellm.method.blocks.task import METHODS, BlockTask
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
from sparsellm.model.capture import Group, RunOrder, skipping, watch
from sparsellm.model.experts import without_experts
from sparsellm.model.units import Unit
from sparsellm.patterns import NM
from sparsellm.registry import Needs, Options


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
    needs = Needs(output_costs=weighted, token_states=True)
    if options["iterations"]:
        return replace(needs, one_process="iterations")
    return needs


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
    weights = None
    if norm_weighting:
        weights = token_weights(task.stream.hidden, norm_weighting)
    fixed = any(isinstance(task.patterns[x.name], NM) for x in task.linears)
    if fixed and symmetries != "none":
        _use_symmetries(task, weights, rotates=symmetries == "rotate")
    order = RunOrder()
    sublayers = find_sublayers(task, order)
    solvers = weighted_solvers(task, solver, power=output_metric)
    damping = refit_damping if refit else None
    fitting = _Fitting(task, weights, solvers=solvers, damping=damping, order=order)
    units: dict[int, tuple[Unit, int]] = {}
    if refit:
        units = units_to_alternate(task, sublayers, solver=solver, asked=iterations)
    for place, sublayer in enumerate(sublayers):
        if place in units:
            unit, rounds = units[place]
            settings = LoopSettings(rounds, damping=refit_damping)
            prune_unit(task, unit, weights=weights, solvers=solvers, settings=settings)
        else:
            fitting.prune_sublayer(sublayer)
    prune_experts(task, fitting.solve, token_weights=weights, refit=damping)
    known = {name for sublayer in sublayers for name in sublayer.names}
    rest = [
        linear for linear in without_experts(task.linears) if linear.name not in known
    ]
    if rest:  # those that do not get every token
        task.prune_each(task.statistics(rest, weights), fitting.solve)


def _use_symmetries(
    task: BlockTask, weights: list[Tensor] | None, *, rotates: bool
) -> None:
    """Rotates values of attention, if ``rotates`` says so, and orders channels, so that N:M costs less."""
    with task.clock.phase("prune/permutation"):
        channels = find_channels(task)
    rotating = [one for one in channels if one.rotates and rotates]
    if rotating:
        task.report("rotation")
        linears = [linear for one in rotating for linear in one.linears]
        statistics = task.statistics(linears, weights)
        grams = {linear.name: gram for group, gram in statistics for linear in group}
        with task.clock.phase("prune/rotation"):
            rotate_channels(rotating, grams, patterns=task.patterns)
    if channels:
        task.report("permutation")
        with task.clock.phase("prune/permutation"):
            permute_block(task, channels, weights)


class _Means:
    """Weighted means over tokens of the inputs of a group of linears and, if its linear is fitted, of the targets. From
    them follows the bias that makes up for the change of the mean output. Without a bias nothing is summed."""

    def __init__(
        self, group: Sequence[LinearView], fitted: bool, device: torch.device
    ) -> None:
        head = group[0]
        self._fitted = fitted
        self._sums: list[CrossAccumulator] = []  # sums over weights, inputs and targets
        if any(linear.bias is not None for linear in group):
            sizes = [1, head.in_features]
            if fitted:
                sizes.append(head.out_features)
            self._sums = [CrossAccumulator(1, size, device) for size in sizes]

    def update(self, x: Tensor, target: Tensor | None, weights: Tensor | None) -> None:
        ones = x.new_ones(*x.shape[:-1], 1)
        values = [ones, x]
        if target is not None:
            values.append(target)
        for total, some in zip(self._sums, values, strict=False):
            total.update(ones, some, weights)

    def reduce(self) -> None:
        for total in self._sums:
            total.reduce()

    @contextmanager
    def kept(self, linear: LinearView) -> Iterator[None]:
        """Until the context ends, the weight may change. Then the bias is set, so that the mean output is what it was,
        or that of the target."""
        if linear.bias is None:
            yield
            return
        weight, *means = (total.finish()[0] for total in self._sums)
        inputs = means[0] / weight
        if self._fitted:
            goal = means[1] / weight
        else:
            goal = linear.bias + linear.weight() @ inputs
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
        """Prunes one group after another. The writer is refitted to the output that it had before all of them."""
        task = self.task
        changed = any(
            task.changes(linear)
            for group in sublayer.groups
            for linear in group
            if linear is not sublayer.writer
        )
        writer = None
        if self.damping is not None and changed:
            writer = sublayer.writer
        recorded = writer
        # batches of the writer's output before pruning
        with task.stream.store() as target:
            for group in sublayer.groups:
                task.report(
                    "+".join(linear.name.rpartition(".")[2] for linear in group)
                )
                gram, crosses, means = self._moments(
                    group, target, recorded=recorded, fitted=group[0] is writer
                )
                recorded = None  # the first pass had it
                task.prune_each(
                    [(group, gram)], partial(self._prune, crosses=crosses, means=means)
                )

    def _prune(
        self, linear: LinearView, gram: Gram, crosses: dict[str, Tensor], means: _Means
    ) -> None:
        """Fits a linear to its target if it has a cross-moment, which is freed, prunes it and sets its bias."""
        task = self.task
        fit = None
        if linear.name in crosses and self.damping is not None:
            with task.clock.phase("prune/solve"), naming(linear.name):
                fit = least_squares(
                    gram, crosses.pop(linear.name), self.damping, prior=linear.weight()
                )
        if fit is not None or task.changes(linear):
            with means.kept(linear):
                self.solve(linear, gram, fit)
        else:
            self.solve(linear, gram)

    def _moments(
        self,
        group: Group,
        target: TensorStore,
        recorded: LinearView | None,
        *,
        fitted: bool,
    ) -> tuple[Gram, dict[str, Tensor], _Means]:
        """The Gram matrix of the input of a group, its cross-moment with the target ``(out, in)``, by the name of the
        linear, if that is fitted, and its means.

        They take one pass, which also appends the outputs of ``recorded`` to ``target``. Linears that only run after
        both are skipped."""
        stream = self.task.stream
        index = self.task.index
        head = group[0]
        means = _Means(group, fitted, stream.chain.device)
        gram = GramAccumulator(head.in_features, stream.chain.device)
        cross = None
        if fitted:
            cross = CrossAccumulator(
                head.out_features, head.in_features, stream.chain.device
            )
        bias = head.bias
        position = 0  # the number of the batch, read by the hook

        def see(linear: LinearView, x: Tensor, y: Tensor) -> None:
            if linear is head:
                weights = None
                if self.weights is not None:
                    weights = self.weights[position]
                gram.update(x, weights)
                goal = None
                if cross is not None:
                    goal = target[position]  # read once: it may be on a disk
                    cross.update(goal if bias is None else goal - bias, x, weights)
                means.update(x, goal, weights)
            if linear is recorded:
                # later operations may change it in place
                target.append(y.detach().clone())

        outputs = [] if recorded is None else [recorded]
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
        crosses: dict[str, Tensor] = {}
        with naming(head.name):
            finished = gram.finish()
            if cross is not None:
                cross.reduce()
                crosses[head.name] = cross.finish()
        return finished, crosses, means
