"""SparseLLM: prunes the linears of a block in the order in which they run, each fitted to the outputs of those before.

1. The groups of linears that share an input are pruned in the order in which they run (q,k,v → o → up,gate → down).
   The block runs again before each group, so every statistic is of the inputs that the pruned model produces.
2. The last linear of a sublayer is its output projection (the *writer*), which adds to the residual stream. It is
   refitted before it is pruned: least squares towards the output that the sublayer had before any of its linears was
   pruned. So it compensates the errors of the other linears.
3. Instead of 1 and 2, a feed-forward unit is pruned by its auxiliary variables where that pays: in two-layer ReLU
   units at high sparsity, or wherever ``options.iterations`` asks for it.
4. After all blocks, the run sweeps the whole model towards the dense model's predictions (``effort``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from sparsellm import parallel
from sparsellm.chain import LinearView
from sparsellm.chain.activations import relu
from sparsellm.chain.capture import RunOrder, replacing, skipping, watch
from sparsellm.chain.shortcuts import KnownOutput
from sparsellm.chain.units import FeedForwardUnit
from sparsellm.decomposition import Settings
from sparsellm.errors import RecipeError
from sparsellm.methods.feed_forward import UNIT_STREAMS, find_units, prune_unit
from sparsellm.methods.permutation import permute_block, permute_expert
from sparsellm.methods.routed import (
    ExpertTokens,
    find_expert_unit,
    prune_expert_unit,
    prune_experts,
    without_experts,
)
from sparsellm.methods.sublayers import Sublayer, find_sublayers
from sparsellm.methods.task import METHODS, BlockTask
from sparsellm.methods.weighting import token_weights, weighted_solvers
from sparsellm.patterns import NM
from sparsellm.registry import Needs, Workspace
from sparsellm.solvers import SOLVERS, Solver
from sparsellm.statistics import CrossAccumulator, Fit, Gram, GramAccumulator, least_squares
from sparsellm.storage.scratch import TensorStore

ROUNDS = 2  # alternations of the auxiliary variables, where they pay; four and eight gain no more
PAYS = 0.75  # sparsity from which they do


def _needs(options: dict[str, Any]) -> Needs:
    inside = SOLVERS[options["solver"]].workspace
    weighted = options["output_metric"] > 0
    return Needs(
        output_costs=weighted,
        token_states=True,
        one_process="iterations" if options["iterations"] else "",
        workspace=replace(
            inside,
            weights=inside.weights + weighted,  # plus a copy of the weight with scaled rows
            streams=UNIT_STREAMS if options["iterations"] else 0,
        ),
    )


def _validate(options: dict[str, Any]) -> None:
    SOLVERS[options["solver"]]  # raises RecipeError for an unknown name
    if options["iterations"] and not options["refit"]:
        raise RecipeError("options.iterations of sparsellm includes the refit; leave options.refit at true")


@METHODS.register(
    "sparsellm",
    paper="arXiv 2402.17946, with the solver of 2406.07831",
    needs=_needs,
    validate=_validate,
    workspace=Workspace(
        weights=7, grams=2, streams=1, writers=2
    ),  # of the refit; writers of attention and feed-forward
    distributed=True,
    allocation="threshold",
    effort=1,
)
def sparsellm(
    task: BlockTask,
    *,
    solver: Annotated[str, "the local solver inside"] = "admm",
    refit: Annotated[bool, "fit the last linear of each sublayer to the dense sublayer's output"] = True,
    refit_damping: Annotated[float, Field(ge=0), "ridge of that fit towards the dense weight"] = 0.1,
    output_metric: Annotated[
        float, Field(ge=0, le=1), "exponent of E[g²] in the weights of outputs; 0: equal weights"
    ] = 0.5,
    norm_weighting: Annotated[
        float, Field(ge=0), "tokens whose norm is above this many medians get less weight; 0: equal weights"
    ] = 1.5,
    permute: Annotated[bool, "N:M: order inputs so that the largest weights do not share a group"] = True,
    iterations: Annotated[
        int | None,
        Field(ge=0),
        "alternations of the feed-forward units' auxiliary variables; null: 2 in sparse two-layer ReLU units",
    ] = None,
) -> None:
    """Global pruning by auxiliary targets: linears in the order they run, each fitted to what is left to it."""
    if task.idle:
        return  # without zeros there is no error to compensate: the weights keep every bit
    order = RunOrder()
    task.stream.forget()
    weights = token_weights(task.stream.hidden, norm_weighting) if norm_weighting else None
    if permute:
        permute_block(task, weights)
    sublayers = find_sublayers(task, order)
    solvers = weighted_solvers(task, solver, output_metric)
    fitting = _Fitting(weights, solvers, refit, refit_damping, order, permute, sublayers)
    sparsest = max(task.patterns[linear.name].sparsity for linear in task.linears)
    wanted = iterations if iterations is not None else refit and sparsest >= PAYS
    units = find_units(task) if wanted else []

    def rounds_of(unit: FeedForwardUnit | None) -> int:
        return _rounds(task, unit, solver) if iterations is None else iterations

    for sublayer in sublayers:
        unit = next((unit for unit in units if _names(unit.linears()) == _names(sublayer.linears())), None)
        rounds = rounds_of(unit)
        if unit is not None and rounds:
            prune_unit(task, unit, weights, fitting.solvers, Settings(rounds, damping=refit_damping))
        else:
            _prune_in_order(task, sublayer, fitting)
    _prune_rest(task, sublayers, fitting, rounds_of if wanted else None)


def _rounds(task: BlockTask, unit: FeedForwardUnit | None, solver: str) -> int:
    """Alternations where the user leaves them open, by the structure of the unit, the solver and the sparsity.

    In a ReLU model the variables lower the excess by about a tenth from :data:`PAYS` on, unstructured with SparseGPT
    inside and in N:M with ADMM inside (docs/results.md, *What the auxiliary variables are worth*). Elsewhere they gain
    nothing that three seeds agree on, and nothing in gated units.
    """
    if unit is None or unit.gate is not None or unit.activation is not relu:
        return 0
    patterns = [task.patterns[linear.name] for linear in unit.linears()]
    sparsity = sum(pattern.sparsity for pattern in patterns) / len(patterns)
    fixed = all(isinstance(pattern, NM) for pattern in patterns)
    if sparsity < PAYS or (solver, fixed) not in (("sparsegpt", False), ("admm", True)):
        return 0
    if parallel.size() > 1:
        task.notes[unit.down.name] = ("pruned without auxiliary variables, which work in one process only",)
        return 0
    return ROUNDS


@dataclass(frozen=True)
class _Fitting:
    """The settings for fitting and pruning the linears of a block.

    Attributes:
        weights: of tokens, batches ``(batch, seq)``, or None for equal ones.
        solvers: of each linear, by name.
        refit: whether output projections are refitted before they are pruned.
        damping: ridge of the refit.
        order: the order in which the block's linears run.
        permute: whether N:M orders the channels of experts.
        sublayers: of the block.
    """

    weights: list[Tensor] | None
    solvers: Mapping[str, Solver]
    refit: bool
    damping: float
    order: RunOrder
    permute: bool
    sublayers: list[Sublayer]


def _prune_in_order(task: BlockTask, sublayer: Sublayer, fitting: _Fitting) -> None:
    """Prunes one group after another; the refit's target is the writer's output before the first group was pruned."""
    writer = sublayer.writer if fitting.refit else None
    with task.stream.store() as target:  # batches of the writer's output before pruning
        for group in sublayer.groups:
            task.report("+".join(linear.name.rpartition(".")[2] for linear in group))
            shortcut = sublayer.shortcut if group[0] is sublayer.writer else None
            known = task.stream.keep(shortcut) if shortcut is not None else None
            if group[0] is writer:
                gram, cross = _moments_of_writer(task, writer, target, fitting, known)
                with task.clock.phase("prune/solve"):
                    fit = least_squares(gram, cross, fitting.damping, prior=writer.weight())
                del cross
                gram.forget()  # frees the factors of the refit before the solver, which takes the most memory
                _solve(task, writer, gram, fitting, fit)
            else:
                first = group is sublayer.groups[0]
                gram = _gram(task, group[0], fitting, target, known, recorded=writer if first else None)
                for linear in group:
                    _solve(task, linear, gram, fitting)
            if known is not None:
                task.stream.known.append(known)  # of the writer as it is now


def _solve(task: BlockTask, linear: LinearView, gram: Gram, fitting: _Fitting, fit: Fit | None = None) -> None:
    """Prunes the weight of a linear, or its refitted weight if there is one, and assigns the result."""
    with task.clock.phase("prune/solve"):
        wanted = linear.weight() if fit is None else fit.weight
        solution = fitting.solvers[linear.name](wanted, gram, task.patterns[linear.name])
    solution = solution if fit is None else replace(solution, notes=(*fit.notes, *solution.notes))
    task.accept(linear, solution, gram, wanted)


def _gram(
    task: BlockTask,
    head: LinearView,
    fitting: _Fitting,
    target: TensorStore,
    known: KnownOutput | None,
    recorded: LinearView | None,
) -> Gram:
    """The Gram matrix of the input of ``head``, from one pass that also appends the outputs of ``recorded`` to
    ``target``, and that input to ``known``."""
    gram = GramAccumulator(head.in_features, task.stream.chain.device)

    def see(position: int, linear: LinearView, entering: Tensor, leaving: Tensor) -> None:
        if linear is head:
            if known is not None:
                known.append(entering)
            gram.update(entering, fitting.weights[position] if fitting.weights is not None else None)
        if linear is recorded:
            target.append(leaving.detach().clone())  # later operations may change it in place

    _pass(task, head, recorded, fitting, see)
    gram.reduce()
    return gram.finish()


def _moments_of_writer(
    task: BlockTask, writer: LinearView, target: TensorStore, fitting: _Fitting, known: KnownOutput | None
) -> tuple[Gram, Tensor]:
    """The Gram matrix of a writer's input, and its cross-moment with the target ``(out, in)``, from one pass that also
    appends that input to ``known``."""
    gram = GramAccumulator(writer.in_features, task.stream.chain.device)
    cross = CrossAccumulator(writer.out_features, writer.in_features, task.stream.chain.device)
    bias = writer.bias

    def see(position: int, linear: LinearView, entering: Tensor, leaving: Tensor) -> None:
        weights = fitting.weights[position] if fitting.weights is not None else None
        if known is not None:
            known.append(entering)
        gram.update(entering, weights)
        wanted = target[position]
        cross.update(wanted if bias is None else wanted - bias, entering, weights)

    _pass(task, writer, None, fitting, see)
    gram.reduce()
    cross.reduce()
    return gram.finish(), cross.finish()


def _pass(
    task: BlockTask,
    head: LinearView,
    recorded: LinearView | None,
    fitting: _Fitting,
    see: Callable[[int, LinearView, Tensor, Tensor], None],
) -> None:
    """Runs the block on every batch and calls ``see(batch number, linear, input, output)`` for the two linears.

    Linears that only run after both are skipped, and so are modules around them.
    """
    seen = [head, *([recorded] if recorded is not None else [])]
    linears = task.stream.chain.linears(task.index)
    unread = fitting.order.unread(linears, inputs=[head], outputs=seen[1:])
    read = {linear.module for linear in seen} | {x.module for x in linears} - {x.module for x in unread}
    around = [sublayer.shortcut for sublayer in fitting.sublayers if sublayer.shortcut is not None]
    idle = {each.module: each.zeros for each in around if each.like_input and read.isdisjoint(each.module.modules())}
    position = 0  # the number of the batch, read by the hook
    with (
        task.clock.phase("prune/statistics"),
        watch(seen, lambda *args: see(position, *args)),
        skipping(unread),
        replacing(idle),
    ):
        for position in range(len(task.stream)):
            task.stream.run_batch(task.index, position)


def _prune_rest(
    task: BlockTask,
    sublayers: list[Sublayer],
    fitting: _Fitting,
    rounds_of: Callable[[FeedForwardUnit | None], int] | None,
) -> None:
    """Prunes the experts, and then linears that do not get every token either: each by itself.

    The statistics of the latter take one pass. One that no token reaches is left to :meth:`BlockTask.finish`.

    Args:
        rounds_of: the alternations of the auxiliary variables of a unit; None if no unit has any.
    """

    def solve(linear: LinearView, gram: Gram, fit: Fit | None = None) -> None:
        _solve(task, linear, gram, fitting, fit)

    def alternate(own: ExpertTokens, linears: list[LinearView]) -> bool:
        if fitting.permute:
            permute_expert(task, own, linears)
        unit = find_expert_unit(own, linears) if rounds_of is not None else None
        rounds = rounds_of(unit) if rounds_of is not None else 0
        if unit is None or not rounds:
            return False
        prune_expert_unit(task, own, unit, fitting.solvers, Settings(rounds, damping=fitting.damping))
        return True

    refit = fitting.damping if fitting.refit else None
    prune_experts(task, solve, fitting.weights, refit=refit, instead=alternate)
    known = {name for sublayer in sublayers for name in _names(sublayer.linears())}
    rest = [linear for linear in without_experts(task.linears) if linear.name not in known]
    if not rest:
        return
    task.report("rest")
    for group, gram in task.statistics(rest, fitting.weights):
        for linear in group:
            _solve(task, linear, gram, fitting)


def _names(linears: list[LinearView]) -> set[str]:
    return {linear.name for linear in linears}
